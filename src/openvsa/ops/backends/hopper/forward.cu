// Forward: out and lse. One consumer warpgroup holds 64 query rows; the tiles of keys and values that several consumers
// of a group need are loaded once. The scores of the next tile are multiplied while the softmax of this one runs.

// How far, in powers of two, a running maximum may be exceeded before sums are rescaled. Weights stay below 2**8, and
// out and lse are the same: the maximum only centres them.
constexpr float SLACK = 8.0f;
constexpr float LN_2 = 0.6931471805599453f;

struct Softmax {
    float max[2], sum[2];    // of a thread's two rows; sum is over the thread's own columns
    float factor[2];         // by which what was summed before must be multiplied
    bool rescale;

    __device__ __forceinline__ void reset() {
        max[0] = max[1] = -INFINITE;
        sum[0] = sum[1] = 0;
    }

    // Scores become weights.
    __device__ __forceinline__ void step(float (&s)[32], float scale) {
        rescale = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = s[2 * r];
#pragma unroll
            for (int i = 0; i < 8; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
            top = quad_max(top);
            factor[r] = 1;
            if (!((top - max[r]) * scale <= SLACK)) {
                factor[r] = exp2_approx((max[r] - top) * scale);
                // All scores so far are -inf: nothing was summed.
                if (max[r] == -INFINITE) factor[r] = 0;
                max[r] = top;
                rescale = true;
            }
            float centre = max[r] == -INFINITE ? 0.0f : max[r] * scale;
            float total = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& x = s[4 * i + 2 * r + j];
                    x = exp2_approx(fmaf(x, scale, -centre));
                    total += x;
                }
            }
            sum[r] = fmaf(sum[r], factor[r], total);
        }
    }

    __device__ __forceinline__ void apply(float (&o)[HEAD_DIM / 2]) {
        if (__any_sync(0xffffffffu, rescale)) {
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; ++i) {
                o[4 * i] *= factor[0];
                o[4 * i + 1] *= factor[0];
                o[4 * i + 2] *= factor[1];
                o[4 * i + 3] *= factor[1];
            }
        }
    }
};

__device__ __forceinline__ void hide_tail(float (&s)[32], int length, Lane lane) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
            if (8 * i + lane.column + j >= length) s[4 * i + j] = s[4 * i + 2 + j] = -INFINITE;
}

__device__ __forceinline__ void consume(Ring& ring, const Problem& problem, const half_bits* q, half_bits* out,
                                        float* lse, int64 q_batch, int64 q_row, int64 q_head, float scale,
                                        int consumer) {
    Lane lane;
    Position position;
    int number = -1;
    next_slot<NOT_HOLDING>(ring, position, consumer, number);
    while (number >= 0) {
        Item item(number, problem);
        Rows rows(item, consumer, problem);
        uint32 q_operand[HEAD_DIM / 4];
        if (rows.length > 0)
            load_operand(q_operand, q + item.batch * q_batch + item.head * q_head + rows.start * q_row, q_row,
                         rows.length, lane);
        float o[HEAD_DIM / 2];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0;
        Softmax softmax;
        softmax.reset();
        float s[32];
        uint32 p[16];

        int next = TOO_FAR;
        while (next != ITEM_ENDS) {
            int stage = next_slot<NOT_HOLDING>(ring, position, consumer, number);
            if (stage < 0) break;
            int length = ring.slots[stage].length;
            clear_tails(ring, stage, consumer);
            pin(q_operand);
            wgmma_fence();
            multiply_over_head_dim(s, q_operand, ring.tiles[stage][0]);
            wgmma_commit();
            wgmma_wait<0>();
            pin(s);
            if (length < TILE) hide_tail(s, length, lane);
            softmax.step(s, scale * LOG2_E);
            softmax.apply(o);
            pack_operand(p, s);
            while ((next = next_slot<HOLDING>(ring, position, consumer, number)) >= 0) {
                length = ring.slots[next].length;
                clear_tails(ring, next, consumer);
                pin(s);
                pin(p);
                pin(o);
                wgmma_fence();
                multiply_over_head_dim(s, q_operand, ring.tiles[next][0]);
                wgmma_commit();
                multiply_over_tokens(o, p, ring.tiles[stage][1]);
                wgmma_commit();
                wgmma_wait<1>();
                pin(s);
                if (length < TILE) hide_tail(s, length, lane);
                softmax.step(s, scale * LOG2_E);
                wgmma_wait<0>();
                pin(o);
                pin(p);
                release(ring, stage);
                softmax.apply(o);
                pack_operand(p, s);
                stage = next;
            }
            pin(p);
            pin(o);
            wgmma_fence();
            multiply_over_tokens(o, p, ring.tiles[stage][1]);
            wgmma_commit();
            wgmma_wait<0>();
            pin(o);
            release(ring, stage);
        }

        float factor[2];
        float* lse_rows = lse + int64(item.batch * problem.heads + item.head) * problem.seq_q + rows.start;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = quad_sum(softmax.sum[r]);
            // A row that read nothing has sum 0 and maximum -inf.
            factor[r] = sum == 0 ? 1.0f : 1.0f / sum;
            int row = lane.row + 8 * r;
            if (lane.column == 0 && row < rows.length)
                lse_rows[row] = sum == 0 ? -INFINITE : fmaf(softmax.max[r], scale, log2_approx(sum) * LN_2);
        }
        int64 out_row = int64(problem.heads) * HEAD_DIM;
        half_bits* out_rows = out + (int64(item.batch) * problem.seq_q + rows.start) * out_row + item.head * HEAD_DIM;
        store_rows(out_rows, out_row, rows.length, lane, o, factor[0], factor[1]);
    }
}

static_assert(sizeof(Ring) + 1024 <= SHARED_BYTES, "the tiles do not fit");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
            const __grid_constant__ Problem problem, const half_bits* q, half_bits* out, float* lse, int* next_item,
            int64 q_batch, int64 q_row, int64 q_head, float scale) {
    extern __shared__ char memory[];
    Ring& ring = *reinterpret_cast<Ring*>((reinterpret_cast<uint64>(memory) + 1023) & ~uint64(1023));
    if (threadIdx.x == 0) ring_init(ring);
    __syncthreads();
    if (threadIdx.x >= 128 * CONSUMERS) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 128 * CONSUMERS) produce(ring, problem, &k_map, &v_map, next_item);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(ring, problem, q, out, lse, q_batch, q_row, q_head, scale, threadIdx.x / 128);
    }
}
