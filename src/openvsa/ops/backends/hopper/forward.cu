// Forward, query blocks of up to 64 tokens: out and lse. One consumer warpgroup holds 64 query rows, with a list of its own,
// and takes 64 keys a step. The scores of the next tile, and this one's values, are multiplied while a softmax runs.

__device__ __forceinline__ void consume(Ring& ring, const Problem& problem, const half_bits* q, half_bits* out,
                                        float* lse, int64 q_batch, int64 q_row, int64 q_head, float scale,
                                        int consumer) {
    Lane lane;
    Position position;
    int number = -1, length = 0;
    next_slot<0>(ring, position, consumer, number, length);
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
            int stage = next_slot<0>(ring, position, consumer, number, length);
            if (stage < 0) break;
            pin(q_operand);
            wgmma_fence();
            multiply_over_head_dim(s, q_operand, ring.tiles[stage][0]);
            wgmma_commit();
            clear_tails<1, 1>(ring, stage, length);
            wgmma_wait<0>();
            pin(s);
            set_tail<0>(s, length, -INFINITE, lane);
            softmax.step(s, scale * LOG2_E);
            softmax.apply(o);
            pack_operand(p, s);
            next = next_slot<2>(ring, position, consumer, number, length);
            while (next >= 0) {
                pin(s);
                pin(p);
                pin(o);
                wgmma_fence();
                multiply_over_head_dim(s, q_operand, ring.tiles[next][0]);
                wgmma_commit();
                multiply_over_tokens(o, p, ring.tiles[stage][1]);
                wgmma_commit();
                clear_tails<1, 1>(ring, next, length);
                wgmma_wait<1>();
                pin(s);
                set_tail<0>(s, length, -INFINITE, lane);
                softmax.step(s, scale * LOG2_E);
                pin(s);
                // Here, so that the assembler does not wait for the second product before the softmax.
                int after = next_slot<2>(ring, position, consumer, number, length);
                wgmma_wait<0>();
                pin(o);
                pin(p);
                release(&ring.empty[stage]);
                softmax.apply(o);
                pack_operand(p, s);
                stage = next;
                next = after;
            }
            pin(p);
            pin(o);
            wgmma_fence();
            multiply_over_tokens(o, p, ring.tiles[stage][1]);
            wgmma_commit();
            wgmma_wait<0>();
            pin(o);
            release(&ring.empty[stage]);
        }

        finish(softmax, o, problem, item, rows, out, lse, scale, lane);
    }
}

struct Memory {
    Ring rings[TEAMS];
};

static_assert(sizeof(Memory) <= SHARED_BYTES, "the tiles do not fit");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
            const __grid_constant__ Problem problem, const half_bits* q, half_bits* out, float* lse, int* next_item,
            int64 q_batch, int64 q_row, int64 q_head, float scale) {
    Memory& memory = *reinterpret_cast<Memory*>(shared_memory);
    if (threadIdx.x == 0)
        for (Ring& ring : memory.rings) ring_init(ring);
    __syncthreads();
    if (threadIdx.x >= 128 * WARPGROUPS) {
        give_registers<PRODUCER_REGISTERS>();
        int team = producer_team();
        if (team < TEAMS) produce(memory.rings[team], problem, &k_map, &v_map, next_item);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        Place place;
        consume(memory.rings[place.team], problem, q, out, lse, q_batch, q_row, q_head, scale, place.consumer);
    }
}
