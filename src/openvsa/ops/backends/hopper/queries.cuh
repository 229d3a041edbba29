// What the kernels share that hold query rows and walk key blocks: forward, and the gradient of q.

struct Problem {
    const int* q_offsets;      // [num_q_blocks + 1]
    const int* kv_offsets;     // [num_kv_blocks + 1]
    const int* kv_num_blocks;  // [plan batch, plan heads, num_q_blocks]
    const int* kv_indices;     // [plan batch, plan heads, num_q_blocks, list_width], ascending
    int num_q_blocks, list_width;
    int batch_step, head_step;  // how many lists of one head a step of batch or head moves; 0 where broadcast
    int batch, heads, kv_heads, seq_q;
};

__device__ __forceinline__ int groups_per_head(const Problem& problem) {
    return (problem.num_q_blocks * Q_PIECES + CONSUMERS - 1) / CONSUMERS;
}

// Where a work item lies: heads outermost, so that what runs together reads the same keys.
struct Item {
    int batch, head, group;
    __device__ __forceinline__ Item(int number, const Problem& problem) {
        int groups = groups_per_head(problem);
        group = number % groups;
        head = number / groups % problem.heads;
        batch = number / groups / problem.heads;
    }
};

// The 64 query rows of one consumer; length 0 if there are none.
struct Rows {
    int start, length;
    __device__ __forceinline__ Rows(const Item& item, int consumer, const Problem& problem) : start(0), length(0) {
        int tile = item.group * CONSUMERS + consumer;
        int block = tile / Q_PIECES;
        if (block < problem.num_q_blocks) {
            int first = problem.q_offsets[block];
            start = piece_of(first, problem.q_offsets[block + 1] - first, tile % Q_PIECES, length);
        }
        length = max(length, 0);
    }
};
