// The ring of tiles between the producer and the consumers of the two backward kernels: in each slot two tiles of the same
// tokens, keys and values or queries and gradients.

// What stands in a slot, beside its tiles, in one word. A work item begins with a slot that has no tiles but the number
// of the item; then come its entries: how many tokens of the tiles count, and a bit for every consumer that needs them.
struct Slot {
    int word;
    static __device__ __forceinline__ Slot first(int item) { return {item << 1 | 1}; }
    static __device__ __forceinline__ Slot entry(int length, int consumers) { return {length << 8 | consumers << 1}; }
    __device__ __forceinline__ bool is_first() const { return word & 1; }
    __device__ __forceinline__ int item() const { return word >> 1; }  // -1: there are no more
    __device__ __forceinline__ bool needed_by(int consumer) const { return !is_first() && (word >> (consumer + 1) & 1); }
    __device__ __forceinline__ int length() const { return word >> 8; }
};

struct alignas(TEAMS > 1 ? 1024 : 16) Ring {
    char tiles[STAGES][2][TILE_BYTES];
#if ROW_VALUES
    float rows[STAGES][2][TILE];  // lse and delta of the tile's tokens
#endif
    Slot slots[STAGES];
    uint64 full[STAGES];
    uint64 empty[STAGES];
};

__device__ __forceinline__ void ring_init(Ring& ring) {
    for (int i = 0; i < STAGES; ++i) {
        barrier_init(&ring.full[i], 1);
        barrier_init(&ring.empty[i], ARRIVALS * CONSUMERS);
    }
    barriers_ready();
}

// The next slot that consumer `consumer` needs, and how many of its tokens count; or ITEM_ENDS once a new item begins,
// whose number is then in `item`; or TOO_FAR. Who still holds HELD slots must not wait for one that may come only after
// these are free again.
constexpr int ITEM_ENDS = -1, TOO_FAR = -2;  // HELD: the most that are held when any of them was found

template <int HELD>
__device__ __forceinline__ int next_slot(Ring& ring, Position<STAGES>& position, int consumer, int& item, int& length) {
#pragma unroll 1
    for (int seen = 0; HELD == 0 || seen < (STAGES - 1) / HELD; ++seen) {
        int stage = position.stage;
        barrier_wait(&ring.full[stage], position.phase);
        // Through a shuffle, so that the compiler knows it for the same in all lanes: addresses then need no copies.
        Slot slot = {__shfl_sync(0xffffffffu, ring.slots[stage].word, 0)};
        position.advance();
        if (slot.needed_by(consumer)) {
            length = slot.length();
            return stage;
        }
        release(&ring.empty[stage]);
        if (slot.is_first()) {
            item = slot.item();
            return ITEM_ENDS;
        }
    }
    return TOO_FAR;
}

// The first TILES tiles of a slot, if they are short, before they are multiplied over their tokens: zeros beyond their
// length. Called while products of scores run, so that it costs no time; these may read the rows before or after, for their
// scores are hidden.
template <int TILES>
__device__ __forceinline__ void clear_tails(Ring& ring, int stage, int length) {
    if (length == TILE) return;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int part = 0; part < HALVES; ++part)
            clear_rows(ring.tiles[stage][tile] + part * PART_BYTES, length, TILE);
    fence_async_proxy();
    sync_warpgroup();
}

// ---------------------------------------------------------------------------------------------- by the producer warp

// The slot for item `item`: no tiles.
__device__ __forceinline__ void announce(Ring& ring, Position<STAGES>& position, int item) {
    barrier_wait(&ring.empty[position.stage], position.phase ^ 1);
    if ((threadIdx.x & 31) == 0) {
        ring.slots[position.stage] = Slot::first(item);
        barrier_arrive(&ring.full[position.stage]);
    }
    __syncwarp();
    position.advance();
}
