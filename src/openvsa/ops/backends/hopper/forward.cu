// Forward: out and lse. A team is one warpgroup that holds 64 query rows, with a list of its own, and takes 64 keys a step.
// The scores of the next tile, and this one's values, are multiplied while a softmax runs. Queries lie in shared memory:
// what registers and tiles are left is then enough for three teams, or four, and these hide each other's waits.
//
// Keys are free again once multiplied, a step before their values: they have a ring of their own. The producer loads the
// keys of a step before the values of the one before.

static_assert(CONSUMERS == 1, "a team is one warpgroup");
static_assert(VALUE_STAGES > 1, "a consumer looks for the next keys while it still holds the values of the step before");

struct Tiles {
    char queries[TILE_BYTES];
    char keys[KEY_STAGES][TILE_BYTES];
    char values[VALUE_STAGES][TILE_BYTES];
};

// What a step is: how many of its tokens count, and whether a work item begins with it. An item that reads nothing has one
// step of no tokens, which takes a slot of the keys' ring but no tile.
struct Word {
    int word;
    static __device__ __forceinline__ Word of(int length, bool begins) { return {length | int(begins) << 8}; }
    __device__ __forceinline__ int length() const { return word & 0xff; }
    __device__ __forceinline__ bool begins() const { return word >> 8; }
};

struct Team {
    Word words[KEY_STAGES];
    int items[KEY_STAGES];  // where a work item begins; -1: there are no more
    uint64 keys_full[KEY_STAGES], keys_empty[KEY_STAGES];
    uint64 values_full[VALUE_STAGES], values_empty[VALUE_STAGES];
    uint64 queries_full;
};

struct Memory {
    Tiles tiles[TEAMS];
    Team teams[TEAMS];
};

static_assert(sizeof(Memory) <= SHARED_BYTES, "the tiles do not fit");

__device__ __forceinline__ void init(Team& team) {
    for (uint64& full : team.keys_full) barrier_init(&full, 1);
    for (uint64& empty : team.keys_empty) barrier_init(&empty, ARRIVALS);
    for (uint64& full : team.values_full) barrier_init(&full, 1);
    for (uint64& empty : team.values_empty) barrier_init(&empty, ARRIVALS);
    barrier_init(&team.queries_full, 1);
    barriers_ready();
}

// ---------------------------------------------------------------------------------------------------- the producer

struct Producer {
    Tiles& tiles;
    Team& team;
    const TensorMap *k_map, *v_map;
    Position<KEY_STAGES> keys;
    Position<VALUE_STAGES> values;
    int late = -1, late_head = 0, late_batch = 0;  // values that are not loaded yet: their first token, or -1

    __device__ __forceinline__ void load_late() {
        if (late < 0) return;
        barrier_wait(&team.values_empty[values.stage], values.phase ^ 1);
        if ((threadIdx.x & 31) == 0) {
            uint64* full = &team.values_full[values.stage];
            barrier_expect(full, TILE_BYTES);
            copy_tile(tiles.values[values.stage], v_map, full, late, late_head, late_batch);
        }
        __syncwarp();
        values.advance();
        late = -1;
    }

    // length 0: no tile.
    __device__ __forceinline__ void load(int number, bool begins, int start, int length, int head, int batch) {
        barrier_wait(&team.keys_empty[keys.stage], keys.phase ^ 1);
        if ((threadIdx.x & 31) == 0) {
            uint64* full = &team.keys_full[keys.stage];
            team.words[keys.stage] = Word::of(length, begins);
            team.items[keys.stage] = number;
            if (length > 0) {
                barrier_expect(full, TILE_BYTES);
                copy_tile(tiles.keys[keys.stage], k_map, full, start, head, batch);
            } else
                barrier_arrive(full);
        }
        __syncwarp();
        keys.advance();
        load_late();
        if (length > 0) {
            late = start;
            late_head = head;
            late_batch = batch;
        }
    }
};

__device__ __forceinline__ void produce(Tiles& tiles, Team& team, const Problem& problem, const TensorMap* k_map,
                                        const TensorMap* v_map, int* next_item) {
    Producer producer{tiles, team, k_map, v_map};
    int items = groups_per_head(problem) * problem.heads * problem.batch;
    int number;
    while ((number = take_item(next_item)) < items) {
        Item item(number, problem);
        Rows rows(item, 0, problem);
        int64 list = int64(item.batch * problem.batch_step + item.head * problem.head_step) * problem.num_q_blocks +
                     item.group / Q_PIECES;
        Lists<1> blocks(problem.kv_offsets);
        blocks.set(0, problem.kv_indices + list * problem.list_width, rows.length > 0 ? problem.kv_num_blocks[list] : 0);
        int head = item.head / (problem.heads / problem.kv_heads);
        bool begins = true;
        Entry entry;
        while (blocks.pop(entry))
            for (int piece = 0; piece < KV_PIECES; ++piece) {
                int length;
                int start = piece_of(entry.start, entry.length, piece, length);
                if (length <= 0) break;
                producer.load(number, begins, start, length, head, item.batch);
                begins = false;
            }
        if (begins) producer.load(number, true, 0, 0, 0, 0);
        producer.load_late();
    }
    producer.load(-1, true, 0, 0, 0, 0);
}

// ---------------------------------------------------------------------------------------------------- the consumers

struct Step {
    int keys;
    Word word;
};

__device__ __forceinline__ Step find(Team& team, Position<KEY_STAGES>& keys) {
    int stage = keys.stage;
    barrier_wait(&team.keys_full[stage], keys.phase);
    keys.advance();
    // Through a shuffle, so that the compiler knows it for the same in all lanes: addresses then need no copies.
    return {stage, {__shfl_sync(0xffffffffu, team.words[stage].word, 0)}};
}

// Waits for the values, and makes zeros of their rows from `length` on. Called while scores are multiplied.
__device__ __forceinline__ void await_values(Tiles& tiles, Team& team, const Position<VALUE_STAGES>& values, int length) {
    barrier_wait(&team.values_full[values.stage], values.phase);
    if (length == TILE) return;
#pragma unroll
    for (int part = 0; part < HALVES; ++part)
        clear_rows(tiles.values[values.stage] + part * PART_BYTES, length, TILE);
    fence_async_proxy();
    sync_warpgroup();
}

__device__ __forceinline__ void consume(Tiles& tiles, Team& team, const Problem& problem, const TensorMap* q_map,
                                        half_bits* out, float* lse, float scale) {
    Lane lane;
    Position<KEY_STAGES> keys;
    Position<VALUE_STAGES> values;
    uint32 queries_phase = 0;
    // Begun once all scores of the item before are there: nothing else reads queries. Rows beyond the block's end belong to
    // other blocks, or are zero: no row of a product depends on another.
    auto load_queries = [&](int number) {
        Item item(number, problem);
        Rows rows(item, 0, problem);
        load_own(tiles.queries, q_map, &team.queries_full, rows.start, item.head, item.batch);
    };

    Step next = find(team, keys);
    int number = __shfl_sync(0xffffffffu, team.items[next.keys], 0);
    if (next.word.length() > 0) load_queries(number);
    while (number >= 0) {
        int current = number;
        float o[HEAD_DIM / 2];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0;
        Softmax softmax;
        softmax.reset();
        int length = next.word.length();
        if (length == 0) {
            release(&team.keys_empty[next.keys]);
            next = find(team, keys);
            number = __shfl_sync(0xffffffffu, team.items[next.keys], 0);
            if (next.word.length() > 0) load_queries(number);
        } else {
            float s[32];
            uint32 p[16];
            barrier_wait(&team.queries_full, queries_phase);
            queries_phase ^= 1;
            wgmma_fence();
            multiply_over_head_dim(s, tiles.queries, tiles.keys[next.keys]);
            wgmma_commit();
            wgmma_wait<0>();
            pin(s);
            release(&team.keys_empty[next.keys]);
            set_tail<0>(s, length, -INFINITE, lane);
            softmax.step(s, scale * LOG2_E);
            pack_operand(p, s);
            next = find(team, keys);
            while (!next.word.begins()) {
                pin(s);
                pin(p);
                pin(o);
                wgmma_fence();
                multiply_over_head_dim(s, tiles.queries, tiles.keys[next.keys]);
                wgmma_commit();
                await_values(tiles, team, values, length);
                multiply_over_tokens(o, p, tiles.values[values.stage]);
                wgmma_commit();
                wgmma_wait<1>();
                pin(s);
                release(&team.keys_empty[next.keys]);
                length = next.word.length();
                set_tail<0>(s, length, -INFINITE, lane);
                softmax.step(s, scale * LOG2_E);
                pin(s);
                // Here, so that the assembler does not wait for the second product before the softmax: it moves waits, but
                // not across a loop, nor before what a branch depends on. No sum is negative, so the loop runs once.
#pragma unroll 1
                do next = find(team, keys);
                while (__any_sync(0xffffffffu, softmax.sum[0] + softmax.sum[1] < 0));
                wgmma_wait<0>();
                pin(o);
                pin(p);
                release(&team.values_empty[values.stage]);
                values.advance();
                softmax.apply(o);
                pack_operand(p, s);
            }
            await_values(tiles, team, values, length);
            pin(p);
            pin(o);
            wgmma_fence();
            multiply_over_tokens(o, p, tiles.values[values.stage]);
            wgmma_commit();
            number = __shfl_sync(0xffffffffu, team.items[next.keys], 0);
            if (next.word.length() > 0) load_queries(number);
            wgmma_wait<0>();
            pin(o);
            release(&team.values_empty[values.stage]);
            values.advance();
        }
        Item item(current, problem);
        Rows rows(item, 0, problem);
        finish(softmax, o, problem, item, rows, out, lse, scale, lane);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
            const __grid_constant__ TensorMap v_map, const __grid_constant__ Problem problem, half_bits* out, float* lse,
            int* next_item, float scale) {
    Memory& memory = *reinterpret_cast<Memory*>(shared_memory);
    if (threadIdx.x == 0)
        for (Team& team : memory.teams) init(team);
    __syncthreads();
    if (threadIdx.x >= 128 * WARPGROUPS) {
        give_registers<PRODUCER_REGISTERS>();
        int team = producer_team();
        if (team < TEAMS) produce(memory.tiles[team], memory.teams[team], problem, &k_map, &v_map, next_item);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        int team = Place().team;
        consume(memory.tiles[team], memory.teams[team], problem, &q_map, out, lse, scale);
    }
}
