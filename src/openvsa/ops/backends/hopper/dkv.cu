// Backward, second pass: the gradients of k and v, by key block, over the query blocks that read it. One consumer
// warpgroup holds 64 key rows; scores are multiplied transposed, so that weights are left operands.

struct Problem {
    const int* q_offsets;   // [num_q_blocks + 1]
    const int* kv_offsets;  // [num_kv_blocks + 1]
    const int* q_starts;    // [plan batch, plan heads, num_kv_blocks + 1]
    const int* q_indices;   // [plan batch, plan heads, list_width], readers of each key block, ascending
    int num_q_blocks, num_kv_blocks, list_width;
    int batch_step, head_step;  // how many lists of one head a step of batch or head moves; 0 where broadcast
    int batch, heads, kv_heads, seq_kv;
};

__device__ __forceinline__ int groups_per_head(const Problem& problem) {
    return (problem.num_kv_blocks * KV_PIECES + CONSUMERS - 1) / CONSUMERS;
}

struct Item {
    int batch, head, group;  // head: of the keys
    __device__ __forceinline__ Item(int number, const Problem& problem) {
        int groups = groups_per_head(problem);
        group = number % groups;
        head = number / groups % problem.kv_heads;
        batch = number / groups / problem.kv_heads;
    }
};

// The 64 key rows of one consumer; length 0 if there are none.
struct Rows {
    int start, length;
    __device__ __forceinline__ Rows(const Item& item, int consumer, const Problem& problem) : start(0), length(0) {
        int tile = item.group * CONSUMERS + consumer;
        int block = tile / KV_PIECES;
        if (block < problem.num_kv_blocks) {
            int first = problem.kv_offsets[block];
            start = piece_of(first, problem.kv_offsets[block + 1] - first, tile % KV_PIECES, length);
        }
        length = max(length, 0);
    }
};

struct Memory {
    char own[WARPGROUPS][2][TILE_BYTES];  // each consumer's keys and values
    Ring rings[TEAMS];
    uint64 own_full[WARPGROUPS][2];
};

__device__ __forceinline__ void produce(Ring& ring, const Problem& problem, const TensorMap* q_map,
                                        const TensorMap* grad_map, const float* row_values, int* next_item) {
    Position<STAGES> position;
    int items = groups_per_head(problem) * problem.kv_heads * problem.batch;
    int members = problem.heads / problem.kv_heads;
    int number;
    while ((number = take_item(next_item)) < items) {
        Item item(number, problem);
        announce(ring, position, number);
        for (int member = 0; member < members; ++member) {
            int head = item.head * members + member;
            int64 plan = item.batch * problem.batch_step + head * problem.head_step;
            const int* starts = problem.q_starts + plan * (problem.num_kv_blocks + 1);
            const int* indices = problem.q_indices + plan * problem.list_width;
            Lists<CONSUMERS> lists(problem.q_offsets);
#pragma unroll
            for (int c = 0; c < CONSUMERS; ++c) {
                Rows rows(item, c, problem);
                int block = min((item.group * CONSUMERS + c) / KV_PIECES, problem.num_kv_blocks - 1);
                lists.set(c, indices + starts[block], rows.length > 0 ? starts[block + 1] - starts[block] : 0);
            }
            int64 first_tile = int64(item.batch * problem.heads + head) * problem.num_q_blocks * Q_PIECES;
            Entry entry;
            while (lists.pop(entry)) {
                for (int piece = 0; piece < Q_PIECES; ++piece) {
                    int length;
                    int start = piece_of(entry.start, entry.length, piece, length);
                    if (length <= 0) break;
                    int stage = position.stage;
                    barrier_wait(&ring.empty[stage], position.phase ^ 1);
                    if ((threadIdx.x & 31) == 0) {
                        ring.slots[stage] = Slot::entry(length, entry.lists);
                        barrier_expect(&ring.full[stage], 2 * TILE_BYTES + 2 * TILE * 4);
                        copy_tile(ring.tiles[stage][0], q_map, &ring.full[stage], start, head, item.batch);
                        copy_tile(ring.tiles[stage][1], grad_map, &ring.full[stage], start, head, item.batch);
                        const float* rows = row_values + (first_tile + entry.block * Q_PIECES + piece) * 2 * TILE;
                        copy_bytes(ring.rows[stage], rows, &ring.full[stage], 2 * TILE * 4);
                    }
                    __syncwarp();
                    position.advance();
                }
            }
        }
    }
    announce(ring, position, -1);
}

__device__ __forceinline__ void consume(Memory& memory, const Problem& problem, const TensorMap* k_map,
                                        const TensorMap* v_map, half_bits* dk, half_bits* dv, float scale) {
    Place place;
    int consumer = place.consumer;
    Ring& ring = memory.rings[place.team];
    Lane lane;
    Position<STAGES> position;
    uint32 own_phase = 0;
    int number = -1, length = 0;
    next_slot<0>(ring, position, consumer, number, length);
    while (number >= 0) {
        int current = number;
        char* k_tile = memory.own[place.warpgroup][0];
        char* v_tile = memory.own[place.warpgroup][1];
        if (Item item(number, problem); Rows(item, consumer, problem).length > 0) {
            Rows rows(item, consumer, problem);
            load_own(k_tile, k_map, &memory.own_full[place.warpgroup][0], rows.start, item.head, item.batch);
            load_own(v_tile, v_map, &memory.own_full[place.warpgroup][1], rows.start, item.head, item.batch);
            barrier_wait(&memory.own_full[place.warpgroup][0], own_phase);
            barrier_wait(&memory.own_full[place.warpgroup][1], own_phase);
            own_phase ^= 1;
        }
        float dk_sum[HEAD_DIM / 2], dv_sum[HEAD_DIM / 2];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) dk_sum[i] = dv_sum[i] = 0;

        float s[32], dp[32];
        uint32 p[16], ds[16];
        int next = TOO_FAR;
        while (next != ITEM_ENDS) {
            int stage = next_slot<0>(ring, position, consumer, number, length);
            if (stage < 0) break;
            pin(s);
            wgmma_fence();
            multiply_over_head_dim(s, k_tile, ring.tiles[stage][0]);
            wgmma_commit();
            clear_tails<2>(ring, stage, length);
            while (true) {
                pin(dp);
                wgmma_fence();
                multiply_over_head_dim(dp, v_tile, ring.tiles[stage][1]);
                wgmma_commit();
                wgmma_wait<1>();
                pin(s);
                set_tail<0>(s, length, -INFINITE, lane);
                const float* row_lse = ring.rows[stage][0];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float2 lse = *reinterpret_cast<const float2*>(row_lse + 8 * i + lane.column);
                    s[4 * i] = exp2_approx(fmaf(s[4 * i], scale * LOG2_E, -lse.x));
                    s[4 * i + 1] = exp2_approx(fmaf(s[4 * i + 1], scale * LOG2_E, -lse.y));
                    s[4 * i + 2] = exp2_approx(fmaf(s[4 * i + 2], scale * LOG2_E, -lse.x));
                    s[4 * i + 3] = exp2_approx(fmaf(s[4 * i + 3], scale * LOG2_E, -lse.y));
                }
                pack_operand(p, s);
                pin(s);
                pin(p);
                // Here, so that the assembler does not wait for the second product before the exponentials.
                next = next_slot<1>(ring, position, consumer, number, length);
                wgmma_wait<0>();
                pin(dp);
                pin(dv_sum);
                wgmma_fence();
                multiply_over_tokens(dv_sum, p, ring.tiles[stage][1]);
                wgmma_commit();
                const float* delta = ring.rows[stage][1];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float2 row_delta = *reinterpret_cast<const float2*>(delta + 8 * i + lane.column);
                    s[4 * i] *= dp[4 * i] - row_delta.x;
                    s[4 * i + 1] *= dp[4 * i + 1] - row_delta.y;
                    s[4 * i + 2] *= dp[4 * i + 2] - row_delta.x;
                    s[4 * i + 3] *= dp[4 * i + 3] - row_delta.y;
                }
                pack_operand(ds, s);
                pin(ds);
                pin(s);
                pin(dk_sum);
                wgmma_fence();
                multiply_over_tokens(dk_sum, ds, ring.tiles[stage][0]);
                wgmma_commit();
                if (next < 0) break;
                wgmma_fence();
                multiply_over_head_dim(s, k_tile, ring.tiles[next][0]);
                wgmma_commit();
                clear_tails<2>(ring, next, length);
                wgmma_wait<1>();
                pin(p);
                pin(ds);
                pin(dv_sum);
                pin(dk_sum);
                release(&ring.empty[stage]);
                stage = next;
            }
            wgmma_wait<0>();
            pin(dv_sum);
            pin(dk_sum);
            release(&ring.empty[stage]);
        }

        // Worked out again: between, every register counts.
        Item item(current, problem);
        Rows rows(item, consumer, problem);
        int64 row = int64(problem.kv_heads) * HEAD_DIM;
        int64 first = (int64(item.batch) * problem.seq_kv + rows.start) * row + item.head * HEAD_DIM;
        store_rows(dk + first, row, rows.length, lane, dk_sum, scale, scale);
        store_rows(dv + first, row, rows.length, lane, dv_sum, 1.0f, 1.0f);
    }
}

static_assert(sizeof(Memory) <= SHARED_BYTES, "the tiles do not fit");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    key_gradient(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap grad_map,
                 const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                 const __grid_constant__ Problem problem, const float* row_values, half_bits* dk, half_bits* dv,
                 int* next_item, float scale) {
    Memory& memory = *reinterpret_cast<Memory*>(shared_memory);
    if (threadIdx.x == 0) {
        for (auto& pair : memory.own_full)
            for (uint64& full : pair) barrier_init(&full, 1);
        for (Ring& ring : memory.rings) ring_init(ring);
    }
    __syncthreads();
    if (threadIdx.x >= 128 * WARPGROUPS) {
        give_registers<PRODUCER_REGISTERS>();
        int team = producer_team();
        if (team < TEAMS)
            produce(memory.rings[team], problem, &q_map, &grad_map, row_values, next_item);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(memory, problem, &k_map, &v_map, dk, dv, scale);
    }
}
