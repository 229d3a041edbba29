// The producer of forward and of the gradient of q: tiles of keys and values, each once for all consumers of a group that
// need it.

// The lists of key blocks of an item's consumers.
__device__ __forceinline__ Lists lists_of(const Item& item, const Problem& problem) {
    Lists lists;
    int64 head_lists = int64(item.batch * problem.batch_step + item.head * problem.head_step) * problem.num_q_blocks;
#pragma unroll
    for (int c = 0; c < CONSUMERS; ++c) {
        Rows rows(item, c, problem);
        int64 list = head_lists + min((item.group * CONSUMERS + c) / Q_PIECES, problem.num_q_blocks - 1);
        int count = rows.length > 0 ? problem.kv_num_blocks[list] : 0;
        lists.set(c, problem.kv_indices + list * problem.list_width, count);
    }
    return lists;
}

__device__ __forceinline__ void produce(Ring& ring, const Problem& problem, const TensorMap* k_map,
                                        const TensorMap* v_map, int* next_item) {
    Position position;
    int items = groups_per_head(problem) * problem.heads * problem.batch;
    while (true) {
        int number = atomicAdd(next_item, 1);
        if (number >= items) break;
        Item item(number, problem);
        announce(ring, position, number);
        Lists lists = lists_of(item, problem);
        int kv_head = item.head / (problem.heads / problem.kv_heads);
        int block, consumers;
        while (lists.pop(block, consumers)) {
            for (int piece = 0; piece < KV_PIECES; ++piece) {
                int length;
                int start = piece_of(problem.kv_offsets, block, piece, length);
                if (length <= 0) break;
                int stage = position.stage;
                barrier_wait(&ring.empty[stage], position.phase ^ 1);
                ring.slots[stage] = Slot::entry(length, consumers);
                barrier_expect(&ring.full[stage], 2 * TILE_BYTES);
                copy_tile(ring.tiles[stage][0], k_map, &ring.full[stage], start, kv_head, item.batch);
                copy_tile(ring.tiles[stage][1], v_map, &ring.full[stage], start, kv_head, item.batch);
                position.advance();
            }
        }
    }
    announce(ring, position, -1);
}
