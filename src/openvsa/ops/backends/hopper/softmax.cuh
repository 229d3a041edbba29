// The running softmax of 64 query rows, and what it leaves.

// How far, in powers of two, a running maximum may be exceeded before sums are rescaled. Weights stay below 2**8, and
// out and lse are the same: the maximum only centres them.
constexpr float SLACK = 8.0f;
constexpr float LN_2 = 0.6931471805599453f;

// The largest score of each of a thread's two rows, over the quad that shares them, as integers, which the GPU compares
// three at a time: numbers from 0 on are ordered like their bits. For a row of negative ones see `correct_most`.
template <int N>
__device__ __forceinline__ void find_most(const float (&s)[N], int (&most)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        most[r] = max(__float_as_int(s[2 * r]), __float_as_int(s[2 * r + 1]));
#pragma unroll
        for (int i = 1; i < N / 4; ++i)
            most[r] = max(max(most[r], __float_as_int(s[4 * i + 2 * r])), __float_as_int(s[4 * i + 2 * r + 1]));
        most[r] = max(most[r], __shfl_xor_sync(0xffffffffu, most[r], 1));
        most[r] = max(most[r], __shfl_xor_sync(0xffffffffu, most[r], 2));
    }
}

// Negative numbers are ordered the other way round, without a sign.
template <int N>
__device__ __forceinline__ void correct_most(const float (&s)[N], int (&most)[2]) {
    if (!__any_sync(0xffffffffu, most[0] < 0 || most[1] < 0)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        uint32 least = 0xffffffffu;
#pragma unroll
        for (int i = 0; i < N / 4; ++i)
            least = min(min(least, __float_as_uint(s[4 * i + 2 * r])), __float_as_uint(s[4 * i + 2 * r + 1]));
        least = min(least, __shfl_xor_sync(0xffffffffu, least, 1));
        least = min(least, __shfl_xor_sync(0xffffffffu, least, 2));
        if (most[r] < 0) most[r] = least;
    }
}

struct Softmax {
    float max[2], sum[2];    // of a thread's two rows; sum is over the thread's own columns
    float factor[2];         // by which what was summed before must be multiplied
    bool rescale;

    __device__ __forceinline__ void reset() {
        max[0] = max[1] = -INFINITE;
        sum[0] = sum[1] = 0;
    }

    // Scores become weights: N of them, of two rows.
    template <int N>
    __device__ __forceinline__ void step(float (&s)[N], float scale) {
        int most[2];
        find_most(s, most);
        rescale = false;
        correct_most(s, most);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = __int_as_float(most[r]);
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
            for (int i = 0; i < N / 4; ++i) {
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

// Weighted sums become out, and lse is written.
__device__ __forceinline__ void finish(const Softmax& softmax, const float (&o)[HEAD_DIM / 2], const Problem& problem,
                                       const Item& item, const Rows& rows, half_bits* out, float* lse, float scale,
                                       Lane lane) {
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
