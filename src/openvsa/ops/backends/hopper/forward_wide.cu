// Forward, query blocks of 65 to 128 tokens: out and lse. Two consumer warpgroups share a query block, and so a list, and
// take 128 keys a step. The scores of the next pair of tiles, and this one's values, are multiplied while a softmax runs.

static_assert(TEAMS == 1 && CONSUMERS == 2 && Q_PIECES == 2, "the consumers of a group share one query block");

constexpr int PAIR_PART_BYTES = 2 * PART_BYTES;

// What a pair is, in one word. A work item begins with a pair that has no tiles but the number of the item.
struct PairWord {
    int word;
    static __device__ __forceinline__ PairWord first(int item) { return {item << 1 | 1}; }
    static __device__ __forceinline__ PairWord pair(int length, int second_length) {
        return {second_length << 16 | length << 8};
    }
    __device__ __forceinline__ bool is_first() const { return word & 1; }
    __device__ __forceinline__ int item() const { return word >> 1; }  // -1: there are no more
    __device__ __forceinline__ bool is_full() const { return word == (TILE << 16 | TILE << 8); }
    __device__ __forceinline__ int length() const { return word >> 8 & 0xff; }
    __device__ __forceinline__ int second_length() const { return word >> 16; }
};

// Keys are free again once multiplied, a step before their values: they have a ring of their own.
struct Memory {
    char keys[KEY_STAGES][HALVES][PAIR_PART_BYTES];
    char values[VALUE_STAGES][HALVES][PAIR_PART_BYTES];
    PairWord words[KEY_STAGES];
    uint64 keys_full[KEY_STAGES], keys_empty[KEY_STAGES];
    uint64 values_full[VALUE_STAGES], values_empty[VALUE_STAGES];
};

struct PairPosition {
    int keys = 0, values = 0;
    uint32 keys_phase = 0, values_phase = 0;
    __device__ __forceinline__ void advance() {
        if (++keys == KEY_STAGES) {
            keys = 0;
            keys_phase ^= 1;
        }
        if (++values == VALUE_STAGES) {
            values = 0;
            values_phase ^= 1;
        }
    }
};

__device__ __forceinline__ void init(Memory& memory) {
    for (int i = 0; i < KEY_STAGES; ++i) {
        barrier_init(&memory.keys_full[i], 1);
        barrier_init(&memory.keys_empty[i], ARRIVALS * CONSUMERS);
    }
    for (int i = 0; i < VALUE_STAGES; ++i) {
        barrier_init(&memory.values_full[i], 1);
        barrier_init(&memory.values_empty[i], ARRIVALS * CONSUMERS);
    }
    barriers_ready();
}

// ---------------------------------------------------------------------------------------------------- the producer

struct Producer {
    Memory& memory;
    PairPosition position;
    const TensorMap *k_map, *v_map;
    int head, batch;

    __device__ __forceinline__ void reserve() {
        barrier_wait(&memory.keys_empty[position.keys], position.keys_phase ^ 1);
        barrier_wait(&memory.values_empty[position.values], position.values_phase ^ 1);
    }

    __device__ __forceinline__ void announce(int item) {
        reserve();
        if ((threadIdx.x & 31) == 0) {
            memory.words[position.keys] = PairWord::first(item);
            barrier_arrive(&memory.keys_full[position.keys]);
            barrier_arrive(&memory.values_full[position.values]);
        }
        __syncwarp();
        position.advance();
    }

    // 64 tokens into half of a pair.
    __device__ __forceinline__ void copy(char (&to)[HALVES][PAIR_PART_BYTES], int half, const TensorMap* map,
                                         uint64* barrier, int token) {
        for (int part = 0; part < HALVES; ++part)
            copy_part(to[part] + half * PART_BYTES, map, barrier, token, part, head, batch);
    }

    // second_length 0: there is no second tile.
    __device__ __forceinline__ void load(int start, int length, int second_start, int second_length) {
        reserve();
        if ((threadIdx.x & 31) == 0) {
            memory.words[position.keys] = PairWord::pair(length, second_length);
            int bytes = second_length > 0 ? 2 * TILE_BYTES : TILE_BYTES;
            uint64* full = &memory.keys_full[position.keys];
            barrier_expect(full, bytes);
            copy(memory.keys[position.keys], 0, k_map, full, start);
            if (second_length > 0) copy(memory.keys[position.keys], 1, k_map, full, second_start);
            full = &memory.values_full[position.values];
            barrier_expect(full, bytes);
            copy(memory.values[position.values], 0, v_map, full, start);
            if (second_length > 0) copy(memory.values[position.values], 1, v_map, full, second_start);
        }
        __syncwarp();
        position.advance();
    }
};

__device__ __forceinline__ void produce(Memory& memory, const Problem& problem, const TensorMap* k_map,
                                        const TensorMap* v_map, int* next_item) {
    Producer producer{memory, PairPosition(), k_map, v_map, 0, 0};
    int items = groups_per_head(problem) * problem.heads * problem.batch;
    int number;
    while ((number = take_item(next_item)) < items) {
        Item item(number, problem);
        producer.announce(number);
        producer.head = item.head / (problem.heads / problem.kv_heads);
        producer.batch = item.batch;
        int64 list =
            int64(item.batch * problem.batch_step + item.head * problem.head_step) * problem.num_q_blocks + item.group;
        Lists<1> blocks(problem.kv_offsets);
        blocks.set(0, problem.kv_indices + list * problem.list_width, problem.kv_num_blocks[list]);
        int waiting = 0, waiting_length = 0;  // a tile that waits for a second one
        Entry entry;
        while (blocks.pop(entry))
            for (int piece = 0; piece < KV_PIECES; ++piece) {
                int length;
                int start = piece_of(entry.start, entry.length, piece, length);
                if (length <= 0) break;
                if (waiting_length == 0) {
                    waiting = start;
                    waiting_length = length;
                } else {
                    producer.load(waiting, waiting_length, start, length);
                    waiting_length = 0;
                }
            }
        if (waiting_length > 0) producer.load(waiting, waiting_length, 0, 0);
    }
    producer.announce(-1);
}

// ---------------------------------------------------------------------------------------------------- the consumers

struct Pair {
    PairWord word;
    int keys, values;
    uint32 values_phase;
};

// The next pair, or false once a new item begins, whose number is then in `item`.
__device__ __forceinline__ bool find(Memory& memory, PairPosition& position, int& item, Pair& pair) {
    barrier_wait(&memory.keys_full[position.keys], position.keys_phase);
    // Through a shuffle, so that the compiler knows it for the same in all lanes: addresses then need no copies.
    PairWord word = {__shfl_sync(0xffffffffu, memory.words[position.keys].word, 0)};
    pair = {word, position.keys, position.values, position.values_phase};
    position.advance();
    if (!word.is_first()) return true;
    release(&memory.keys_empty[pair.keys]);
    release(&memory.values_empty[pair.values]);
    item = word.item();
    return false;
}

// Scores of both tiles.
__device__ __forceinline__ void multiply_scores(float (&s)[64], const uint32 (&q)[HEAD_DIM / 4], const void* keys) {
    Descriptor b = as_rows(keys);
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step)
        multiply<0>(s, q + 4 * step, b.at((step >> 2) * PAIR_PART_BYTES + (step & 3) * 32), step);
}

__device__ __forceinline__ void multiply_values(float (&o)[HEAD_DIM / 2], const uint32 (&p)[32], const void* values) {
    Descriptor b = as_columns<PAIR_PART_BYTES>(values);
#pragma unroll
    for (int step = 0; step < 2 * TILE / 16; ++step) multiply<1>(o, p + 4 * step, b.at(step * 2048), 1);
}

__device__ __forceinline__ void await_values(Memory& memory, const Pair& pair) {
    barrier_wait(&memory.values_full[pair.values], pair.values_phase);
}

// Rows of the values beyond the lengths of short tiles become zero. Called while products run, so that it costs no time.
__device__ __forceinline__ void clear_tails(Memory& memory, const Pair& pair) {
    if (pair.word.is_full()) return;
    await_values(memory, pair);
    for (int part = 0; part < HALVES; ++part) {
        clear_rows(memory.values[pair.values][part], pair.word.length(), TILE);
        clear_rows(memory.values[pair.values][part], TILE + pair.word.second_length(), 2 * TILE);
    }
    fence_async_proxy();
    sync_warpgroup();
}

__device__ __forceinline__ void hide_tails(float (&s)[64], PairWord word, Lane lane) {
    if (word.is_full()) return;
    set_tail<0>(s, word.length(), -INFINITE, lane);
    set_tail<8>(s, word.second_length(), -INFINITE, lane);
}

__device__ __forceinline__ void consume(Memory& memory, const Problem& problem, const half_bits* q, half_bits* out,
                                        float* lse, int64 q_batch, int64 q_row, int64 q_head, float scale,
                                        int consumer) {
    Lane lane;
    PairPosition position;
    int number = -1;
    Pair pair, next;
    find(memory, position, number, pair);
    while (number >= 0) {
        Item item(number, problem);
        Rows rows(item, consumer, problem);
        // A consumer without rows multiplies what happens to be there, and writes nothing.
        uint32 q_operand[HEAD_DIM / 4] = {};
        if (rows.length > 0)
            load_operand(q_operand, q + item.batch * q_batch + item.head * q_head + rows.start * q_row, q_row,
                         rows.length, lane);
        float o[HEAD_DIM / 2];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0;
        Softmax softmax;
        softmax.reset();
        float s[64];
        uint32 p[32];

        if (find(memory, position, number, pair)) {
            pin(q_operand);
            pin(s);
            wgmma_fence();
            multiply_scores(s, q_operand, memory.keys[pair.keys]);
            wgmma_commit();
            clear_tails(memory, pair);
            wgmma_wait<0>();
            pin(s);
            release(&memory.keys_empty[pair.keys]);
            hide_tails(s, pair.word, lane);
            softmax.step(s, scale * LOG2_E);
            pack_operand(p, s);
            bool more = find(memory, position, number, next);
            while (more) {
                await_values(memory, pair);
                pin(s);
                pin(p);
                pin(o);
                wgmma_fence();
                multiply_scores(s, q_operand, memory.keys[next.keys]);
                wgmma_commit();
                multiply_values(o, p, memory.values[pair.values]);
                wgmma_commit();
                clear_tails(memory, next);
                wgmma_wait<1>();
                pin(s);
                release(&memory.keys_empty[next.keys]);
                hide_tails(s, next.word, lane);
                softmax.step(s, scale * LOG2_E);
                pin(s);
                // Here, so that the assembler does not wait for the second product before the softmax.
                Pair after;
                more = find(memory, position, number, after);
                wgmma_wait<0>();
                pin(o);
                pin(p);
                release(&memory.values_empty[pair.values]);
                softmax.apply(o);
                pack_operand(p, s);
                pair = next;
                next = after;
            }
            await_values(memory, pair);
            pin(p);
            pin(o);
            wgmma_fence();
            multiply_values(o, p, memory.values[pair.values]);
            wgmma_commit();
            wgmma_wait<0>();
            pin(o);
            release(&memory.values_empty[pair.values]);
        }
        finish(softmax, o, problem, item, rows, out, lse, scale, lane);
    }
}

static_assert(sizeof(Memory) <= SHARED_BYTES, "the tiles do not fit");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward_wide(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
            const __grid_constant__ Problem problem, const half_bits* q, half_bits* out, float* lse, int* next_item,
            int64 q_batch, int64 q_row, int64 q_head, float scale) {
    Memory& memory = *reinterpret_cast<Memory*>(shared_memory);
    if (threadIdx.x == 0) init(memory);
    __syncthreads();
    if (threadIdx.x >= 128 * WARPGROUPS) {
        give_registers<PRODUCER_REGISTERS>();
        if (producer_team() == 0) produce(memory, problem, &k_map, &v_map, next_item);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(memory, problem, q, out, lse, q_batch, q_row, q_head, scale, Place().consumer);
    }
}
