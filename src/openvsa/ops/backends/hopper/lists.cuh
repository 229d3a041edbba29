// The producer of the two kernels that walk key blocks: forward, and the gradient of q.

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
        if (block < problem.num_q_blocks) start = piece_of(problem.q_offsets, block, tile % Q_PIECES, length);
        length = max(length, 0);
    }
};

__device__ __forceinline__ void produce(Ring& ring, const Problem& problem, const TensorMap* k_map,
                                        const TensorMap* v_map, int* next_item) {
    Position position;
    int items = groups_per_head(problem) * problem.heads * problem.batch;
    while (true) {
        int number = atomicAdd(next_item, 1);
        if (number >= items) break;
        Item item(number, problem);
        announce(ring, position, number);

        Lists lists;
        int64 head_lists = int64(item.batch * problem.batch_step + item.head * problem.head_step) * problem.num_q_blocks;
#pragma unroll
        for (int c = 0; c < CONSUMERS; ++c) {
            Rows rows(item, c, problem);
            int64 list = head_lists + min((item.group * CONSUMERS + c) / Q_PIECES, problem.num_q_blocks - 1);
            int count = rows.length > 0 ? problem.kv_num_blocks[list] : 0;
            lists.set(c, problem.kv_indices + list * problem.list_width, count);
        }
        int kv_head = item.head / (problem.heads / problem.kv_heads);
        int block, consumers;
        while (lists.pop(block, consumers)) {
            for (int piece = 0; piece < KV_PIECES; ++piece) {
                int length;
                int start = piece_of(problem.kv_offsets, block, piece, length);
                if (length <= 0) break;
                int stage = position.stage;
                barrier_wait(&ring.empty[stage], position.phase ^ 1);
                ring.slots[stage] = {NOT_AN_ITEM, consumers, length};
                barrier_expect(&ring.full[stage], 2 * TILE_BYTES);
                copy_tile(ring.tiles[stage][0], k_map, &ring.full[stage], start, kv_head, item.batch);
                copy_tile(ring.tiles[stage][1], v_map, &ring.full[stage], start, kv_head, item.batch);
                position.advance();
            }
        }
    }
    announce(ring, position, -1);
}
