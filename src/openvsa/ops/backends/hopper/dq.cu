// Backward, first pass: the gradient of q, by the lists of the forward pass, with no sums in global memory. It also
// leaves for the second pass what that needs of each query row: lse and delta, in tiles of 64 rows.

// s: scores in, their gradients out.
__device__ __forceinline__ void score_gradient(float (&s)[32], const float (&dp)[32], const float (&row_lse)[2],
                                               const float (&delta)[2], float scale, int length, Lane lane) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        int r = i >> 1 & 1;
        s[i] = exp2_approx(fmaf(s[i], scale, -row_lse[r])) * (dp[i] - delta[r]);
    }
    set_tail<0>(s, length, 0, lane);
}

struct Memory {
    char own[WARPGROUPS][TILE_BYTES];  // each consumer's rows of the gradient of out
    Ring rings[TEAMS];
    uint64 own_full[WARPGROUPS];
};

__device__ __forceinline__ void produce(Ring& ring, const Problem& problem, const TensorMap* k_map,
                                        const TensorMap* v_map, int* next_item) {
    Position<STAGES> position;
    int items = groups_per_head(problem) * problem.heads * problem.batch;
    int number;
    while ((number = take_item(next_item)) < items) {
        Item item(number, problem);
        announce(ring, position, number);
        Lists<CONSUMERS> lists(problem.kv_offsets);
        int64 head_lists = int64(item.batch * problem.batch_step + item.head * problem.head_step) * problem.num_q_blocks;
#pragma unroll
        for (int c = 0; c < CONSUMERS; ++c) {
            Rows rows(item, c, problem);
            int64 list = head_lists + min((item.group * CONSUMERS + c) / Q_PIECES, problem.num_q_blocks - 1);
            int count = rows.length > 0 ? problem.kv_num_blocks[list] : 0;
            lists.set(c, problem.kv_indices + list * problem.list_width, count);
        }
        int kv_head = item.head / (problem.heads / problem.kv_heads);
        Entry entry;
        while (lists.pop(entry)) {
            for (int piece = 0; piece < KV_PIECES; ++piece) {
                int length;
                int start = piece_of(entry.start, entry.length, piece, length);
                if (length <= 0) break;
                int stage = position.stage;
                barrier_wait(&ring.empty[stage], position.phase ^ 1);
                if ((threadIdx.x & 31) == 0) {
                    ring.slots[stage] = Slot::entry(length, entry.lists);
                    barrier_expect(&ring.full[stage], 2 * TILE_BYTES);
                    copy_tile(ring.tiles[stage][0], k_map, &ring.full[stage], start, kv_head, item.batch);
                    copy_tile(ring.tiles[stage][1], v_map, &ring.full[stage], start, kv_head, item.batch);
                }
                __syncwarp();
                position.advance();
            }
        }
    }
    announce(ring, position, -1);
}

__device__ __forceinline__ void consume(Memory& memory, const Problem& problem, const TensorMap* grad_map,
                                        const half_bits* q, const half_bits* out, const half_bits* grad, half_bits* dq,
                                        const float* lse, const float* dlse, float* row_values, int64 q_batch,
                                        int64 q_row, int64 q_head, int64 out_batch, int64 out_row, int64 out_head,
                                        int64 grad_batch, int64 grad_row, int64 grad_head, float scale) {
    Place place;
    int consumer = place.consumer;
    Ring& ring = memory.rings[place.team];
    const void* grad_tile = memory.own[place.warpgroup];
    Lane lane;
    Position<STAGES> position;
    uint32 own_phase = 0;
    int number = -1, length = 0;
    next_slot<0>(ring, position, consumer, number, length);
    while (number >= 0) {
        Item item(number, problem);
        Rows rows(item, consumer, problem);
        uint32 q_operand[HEAD_DIM / 4];
        float row_lse[2], delta[2];
        if (rows.length > 0) {
            load_own(memory.own[place.warpgroup], grad_map, &memory.own_full[place.warpgroup], rows.start, item.head,
                     item.batch);
            uint32 grad_operand[HEAD_DIM / 4];
            load_operand(q_operand, out + item.batch * out_batch + item.head * out_head + rows.start * out_row, out_row,
                         rows.length, lane);
            load_operand(grad_operand, grad + item.batch * grad_batch + item.head * grad_head + rows.start * grad_row,
                         grad_row, rows.length, lane);
            int64 first_row = int64(item.batch * problem.heads + item.head) * problem.seq_q + rows.start;
            int64 first_tile = int64(item.batch * problem.heads + item.head) * problem.num_q_blocks * Q_PIECES +
                               item.group * CONSUMERS + consumer;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float product = 0;
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 8; ++i) {
                    uint32 a = q_operand[2 * i + r], b = grad_operand[2 * i + r];
                    product = fmaf(unpack_low(a), unpack_low(b), product);
                    product = fmaf(unpack_high(a), unpack_high(b), product);
                }
                int row = lane.row + 8 * r;
                bool inside = row < rows.length;
                product = quad_sum(product);
                int64 at = first_row + (inside ? row : 0);
                row_lse[r] = inside ? lse[at] * LOG2_E : INFINITE;
                delta[r] = inside ? product - dlse[at] : 0.0f;
                if (lane.column == 0) {
                    float* tile = row_values + first_tile * 2 * TILE;
                    tile[row] = row_lse[r];
                    tile[TILE + row] = delta[r];
                }
            }
            load_operand(q_operand, q + item.batch * q_batch + item.head * q_head + rows.start * q_row, q_row,
                         rows.length, lane);
            barrier_wait(&memory.own_full[place.warpgroup], own_phase);
            own_phase ^= 1;
        }
        float d[HEAD_DIM / 2];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) d[i] = 0;
        float s[32], dp[32];
        uint32 ds[16];

        int next = TOO_FAR;
        while (next != ITEM_ENDS) {
            int stage = next_slot<0>(ring, position, consumer, number, length);
            if (stage < 0) break;
            pin(q_operand);
            wgmma_fence();
            multiply_over_head_dim(s, q_operand, ring.tiles[stage][0]);
            multiply_over_head_dim(dp, grad_tile, ring.tiles[stage][1]);
            wgmma_commit();
            clear_tails<1>(ring, stage, length);
            wgmma_wait<0>();
            pin(s);
            pin(dp);
            score_gradient(s, dp, row_lse, delta, scale * LOG2_E, length, lane);
            pack_operand(ds, s);
            next = next_slot<2>(ring, position, consumer, number, length);
            while (next >= 0) {
                pin(s);
                pin(dp);
                pin(ds);
                pin(d);
                wgmma_fence();
                multiply_over_head_dim(s, q_operand, ring.tiles[next][0]);
                multiply_over_head_dim(dp, grad_tile, ring.tiles[next][1]);
                wgmma_commit();
                multiply_over_tokens(d, ds, ring.tiles[stage][0]);
                wgmma_commit();
                clear_tails<1>(ring, next, length);
                wgmma_wait<1>();
                pin(s);
                pin(dp);
                score_gradient(s, dp, row_lse, delta, scale * LOG2_E, length, lane);
                pin(s);
                // Here, so that the assembler does not wait for the last product before the exponentials.
                int after = next_slot<2>(ring, position, consumer, number, length);
                wgmma_wait<0>();
                pin(d);
                pin(ds);
                release(&ring.empty[stage]);
                pack_operand(ds, s);
                stage = next;
                next = after;
            }
            pin(ds);
            pin(d);
            wgmma_fence();
            multiply_over_tokens(d, ds, ring.tiles[stage][0]);
            wgmma_commit();
            wgmma_wait<0>();
            pin(d);
            release(&ring.empty[stage]);
        }

        int64 dq_row = int64(problem.heads) * HEAD_DIM;
        half_bits* dq_rows = dq + (int64(item.batch) * problem.seq_q + rows.start) * dq_row + item.head * HEAD_DIM;
        store_rows(dq_rows, dq_row, rows.length, lane, d, scale, scale);
    }
}

static_assert(sizeof(Memory) <= SHARED_BYTES, "the tiles do not fit");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    query_gradient(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                   const __grid_constant__ TensorMap grad_map, const __grid_constant__ Problem problem,
                   const half_bits* q, const half_bits* out, const half_bits* grad, half_bits* dq, const float* lse,
                   const float* dlse, float* row_values, int* next_item, int64 q_batch, int64 q_row, int64 q_head,
                   int64 out_batch, int64 out_row, int64 out_head, int64 grad_batch, int64 grad_row, int64 grad_head,
                   float scale) {
    Memory& memory = *reinterpret_cast<Memory*>(shared_memory);
    if (threadIdx.x == 0) {
        for (uint64& full : memory.own_full) barrier_init(&full, 1);
        for (Ring& ring : memory.rings) ring_init(ring);
    }
    __syncthreads();
    if (threadIdx.x >= 128 * WARPGROUPS) {
        give_registers<PRODUCER_REGISTERS>();
        int team = producer_team();
        if (team < TEAMS) produce(memory.rings[team], problem, &k_map, &v_map, next_item);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(memory, problem, &grad_map, q, out, grad, dq, lse, dlse, row_values, q_batch, q_row, q_head, out_batch,
                out_row, out_head, grad_batch, grad_row, grad_head, scale);
    }
}
