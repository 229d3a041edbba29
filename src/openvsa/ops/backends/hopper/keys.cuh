// The producer of the gradient of q: tiles of keys and values, each once for all consumers of a group that need it.

__device__ __forceinline__ void produce(Ring& ring, const Problem& problem, const TensorMap* k_map,
                                        const TensorMap* v_map, int* next_item) {
    Position position;
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
