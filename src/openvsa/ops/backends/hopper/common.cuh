// What the kernels share: barriers, tensor copies, matrix products of one warpgroup, and the lists that a producer warp
// walks. Compiled by NVRTC, without any header.
//
// Set from outside: HEAD_DIM (64 or 128), HALF_FLOAT (1 for float16, 0 for bfloat16), TEAMS (each with a producer warp and
// work items of its own), CONSUMERS (warpgroups of a team, which share its tiles), STAGES, or KEY_STAGES and VALUE_STAGES
// (tiles in flight), Q_PIECES and KV_PIECES (pieces of 64 tokens in the longest block), ROW_VALUES (1 if a slot also holds
// two numbers for each row), ARRIVING_LANES (of a warp, at a barrier: 1, or 32 for a tool), PRODUCER_REGISTERS,
// CONSUMER_REGISTERS, SHARED_BYTES.

typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef long long int64;
typedef unsigned short half_bits;  // a bfloat16 or float16

constexpr int TILE = 64;  // rows of one warpgroup and columns of one step: what one wgmma takes
constexpr int HALVES = HEAD_DIM / 64;  // a row is kept in parts of 128 bytes, the width of the swizzle
constexpr int PART_BYTES = TILE * 128;
constexpr int TILE_BYTES = HALVES * PART_BYTES;
constexpr int WARPGROUPS = TEAMS * CONSUMERS;  // that multiply
constexpr int THREADS = 128 * (WARPGROUPS + 1);
constexpr float LOG2_E = 1.4426950408889634f;
#define INFINITE __int_as_float(0x7f800000)

struct alignas(64) TensorMap { uint64 words[16]; };

extern __shared__ __align__(1024) char shared_memory[];

// ------------------------------------------------------------------------------------------------ small helpers

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
    return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats, rounded to nearest, low half first.
__device__ __forceinline__ uint32 pack(float low, float high) {
    uint32 both;
#if HALF_FLOAT
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

__device__ __forceinline__ float unpack_low(uint32 both) {
#if HALF_FLOAT
    float x;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(x) : "r"(both));
    return x;
#else
    return __uint_as_float(both << 16);
#endif
}

__device__ __forceinline__ float unpack_high(uint32 both) {
#if HALF_FLOAT
    float x;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(x) : "r"(both));
    return x;
#else
    return __uint_as_float(both & 0xffff0000u);
#endif
}

// Over the four threads that share a row of an accumulator.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void sync_warpgroup() {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + threadIdx.x / 128) : "memory");
}

// Orders ordinary writes to shared memory before reads by wgmma and writes by tensor copies.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------------- barriers

__device__ __forceinline__ void barrier_init(uint64* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}

__device__ __forceinline__ void barrier_expect(uint64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64* barrier, uint32 phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)), "r"(phase)
        : "memory");
}

// After the barriers were initialised, by the thread that did.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// How often a warpgroup arrives at a barrier that says that it is done with something.
constexpr int ARRIVALS = 4 * ARRIVING_LANES;

// One warp's word that it no longer reads what the barrier guards. Its first lane speaks for all: they came to __syncwarp
// before. A tool that follows threads does not see that; for it all 32 arrive, and nothing else is different.
__device__ __forceinline__ void release(uint64* empty) {
    __syncwarp();
    if ((threadIdx.x & 31) < ARRIVING_LANES) barrier_arrive(empty);
}

// Where one side is in a ring of tiles.
template <int SLOTS>
struct Position {
    int stage = 0;
    uint32 phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == SLOTS) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// ------------------------------------------------------------------------------------------------ tensor copies

// A tile of 64 tokens of one head, in 128-byte parts. The map has the dimensions (64, token, part, head, batch).
__device__ __forceinline__ void copy_tile(void* to, const TensorMap* map, uint64* barrier, int token, int head,
                                          int batch) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %3, %5, %6}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(0), "r"(token), "r"(head), "r"(batch)
        : "memory");
}

// One part of it, through a map of single parts.
__device__ __forceinline__ void copy_part(void* to, const TensorMap* map, uint64* barrier, int token, int part, int head,
                                          int batch) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(0), "r"(token), "r"(part), "r"(head), "r"(batch)
        : "memory");
}

__device__ __forceinline__ void copy_bytes(void* to, const void* from, uint64* barrier, int bytes) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// ---------------------------------------------------------------------------------------------- matrix products

// Descriptors of tiles in shared memory, swizzled by 128 bytes: as rows (the summed index is contiguous: K of Q Kt) and
// as columns (it is the row: V of P V). Only the low word depends on the tile.
struct Descriptor {
    uint32 low;
    __device__ __forceinline__ uint64 at(int bytes) const {
        return (uint64(0x40000000u | (1024 >> 4)) << 32) | (low + (bytes >> 4));
    }
};

__device__ __forceinline__ Descriptor as_rows(const void* tile) { return {(1u << 16) | (shared_address(tile) >> 4)}; }

// Keeps the compiler from working out all words of a tile before a loop: registers are scarcer than additions.
__device__ __forceinline__ void forget(Descriptor& tile) { asm volatile("" : "+r"(tile.low)); }

// BYTES: how far apart the parts of a row are.
template <int BYTES>
__device__ __forceinline__ Descriptor as_columns(const void* tile) {
    return {(uint32(BYTES >> 4) << 16) | (shared_address(tile) >> 4)};
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of an accumulator across the point where it is complete.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

template <int N>
__device__ __forceinline__ void pin(uint32 (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

#if HALF_FLOAT
#define OPERANDS "f16.f16"
#else
#define OPERANDS "bf16.bf16"
#endif
#define NAMES_32                                                                                             \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
    "%28,%29,%30,%31}"
#define NAMES_64                                                                                             \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
    "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,"    \
    "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define SUMS_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_32(d, i) SUMS_8(d, i), SUMS_8(d, i + 8), SUMS_8(d, i + 16), SUMS_8(d, i + 24)

// d (+)= a b, one step of 16 of the summed index. COLUMNS says how b lies in shared memory.
template <int COLUMNS>
__device__ __forceinline__ void multiply(float (&d)[32], const uint32* a, uint64 b, int add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." OPERANDS " " NAMES_32 ", {%32,%33,%34,%35}, %36, p, 1, 1, %38;}\n"
        : SUMS_32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(COLUMNS));
}

template <int COLUMNS>
__device__ __forceinline__ void multiply(float (&d)[64], const uint32* a, uint64 b, int add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." OPERANDS " " NAMES_64 ", {%64,%65,%66,%67}, %68, p, 1, 1, %70;}\n"
        : SUMS_32(d, 0), SUMS_32(d, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(COLUMNS));
}

__device__ __forceinline__ void multiply_rows(float (&d)[32], uint64 a, uint64 b, int add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." OPERANDS " " NAMES_32 ", %32, %33, p, 1, 1, 0, 0;}\n"
        : SUMS_32(d, 0)
        : "l"(a), "l"(b), "r"(add));
}

// Where step `step` of 16 along a row of 64 or 128 values begins.
__device__ __forceinline__ int along_row(int step) { return (step >> 2) * PART_BYTES + (step & 3) * 32; }

// d = a tile^T over head_dim; a in registers.
__device__ __forceinline__ void multiply_over_head_dim(float (&d)[32], const uint32 (&a)[HEAD_DIM / 4],
                                                       const void* tile) {
    Descriptor b = as_rows(tile);
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) multiply<0>(d, a + 4 * step, b.at(along_row(step)), step);
}

// The same, a in shared memory.
__device__ __forceinline__ void multiply_over_head_dim(float (&d)[32], const void* a_tile, const void* tile) {
    Descriptor a = as_rows(a_tile), b = as_rows(tile);
    forget(a);
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step)
        multiply_rows(d, a.at(along_row(step)), b.at(along_row(step)), step);
}

// d += p tile over the 64 tokens of the tile; p in registers.
__device__ __forceinline__ void multiply_over_tokens(float (&d)[HEAD_DIM / 2], const uint32* p, const void* tile) {
    Descriptor b = as_columns<PART_BYTES>(tile);
#pragma unroll
    for (int step = 0; step < TILE / 16; ++step) multiply<1>(d, p + 4 * step, b.at(step * 2048), 1);
}

// An accumulator as the left operand of the next product.
template <int N>
__device__ __forceinline__ void pack_operand(uint32 (&p)[N], const float (&s)[2 * N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

// --------------------------------------------------------------------------------------- rows of a warpgroup

// Thread t of a warpgroup holds rows `row` and `row + 8` of an accumulator, and of each group of eight columns the two
// from `column`.
struct Lane {
    int row, column;
    __device__ __forceinline__ Lane() {
        int thread = threadIdx.x & 127;
        row = (thread >> 5) * 16 + ((thread & 31) >> 2);
        column = (thread & 3) * 2;
    }
};

// Rows of a tile in global memory as the left operand. Rows from `length` on repeat the last one.
__device__ __forceinline__ void load_operand(uint32 (&a)[HEAD_DIM / 4], const half_bits* x, int64 stride, int length,
                                             Lane lane) {
    const half_bits* upper = x + min(lane.row, length - 1) * stride + lane.column;
    const half_bits* lower = x + min(lane.row + 8, length - 1) * stride + lane.column;
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
        a[4 * step] = *reinterpret_cast<const uint32*>(upper + 16 * step);
        a[4 * step + 1] = *reinterpret_cast<const uint32*>(lower + 16 * step);
        a[4 * step + 2] = *reinterpret_cast<const uint32*>(upper + 16 * step + 8);
        a[4 * step + 3] = *reinterpret_cast<const uint32*>(lower + 16 * step + 8);
    }
}

__device__ __forceinline__ void store_rows(half_bits* x, int64 stride, int length, Lane lane,
                                           const float (&d)[HEAD_DIM / 2], float upper_factor, float lower_factor) {
    half_bits* upper = x + lane.row * stride + lane.column;
    half_bits* lower = upper + 8 * stride;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
        if (lane.row < length)
            *reinterpret_cast<uint32*>(upper + 8 * i) = pack(d[4 * i] * upper_factor, d[4 * i + 1] * upper_factor);
        if (lane.row + 8 < length)
            *reinterpret_cast<uint32*>(lower + 8 * i) = pack(d[4 * i + 2] * lower_factor, d[4 * i + 3] * lower_factor);
    }
}

// A tile of a consumer's own, begun by its first thread once all its warps are done with the last one.
__device__ __forceinline__ void load_own(void* tile, const TensorMap* map, uint64* barrier, int token, int head,
                                         int batch) {
    sync_warpgroup();
    if ((threadIdx.x & 127) == 0) {
        barrier_expect(barrier, TILE_BYTES);
        copy_tile(tile, map, barrier, token, head, batch);
    }
}

// Columns of scores from `length` on, of the tile whose scores begin at group BEGIN of eight columns. In a lattice most
// short tiles end in the last group.
template <int BEGIN, int N>
__device__ __forceinline__ void set_tail(float (&s)[N], int length, float value, Lane lane) {
    if (length == TILE) return;
#pragma unroll
    for (int i = 7; i >= 0; --i) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
            if (8 * i + lane.column + j >= length) s[4 * (BEGIN + i) + j] = s[4 * (BEGIN + i) + 2 + j] = value;
        if (i == 7 && length >= TILE - 8) return;
    }
}

// Rows of 128 bytes in shared memory become zero. They belong to other blocks, or to nobody, and 0 times a NaN there would
// leak. Every warpgroup that reads them does this for itself. Two may do it at once, and one while the other multiplies: all
// write the same, and a tile is not refilled before all have released it, so none sees anything but zeros after its own.
__device__ __forceinline__ void clear_rows(char* rows, int begin, int end) {
#pragma unroll 1
    for (int i = begin * 8 + (threadIdx.x & 127); i < end * 8; i += 128)
        *reinterpret_cast<uint4*>(rows + i * 16) = make_uint4(0, 0, 0, 0);
}

// ------------------------------------------------------------------------------------------------------- the lists

// Piece `piece` of a block: its first token, and how many of its tokens lie in the block (0 or less: none).
__device__ __forceinline__ int piece_of(int start, int length, int piece, int& piece_length) {
    piece_length = min(TILE, length - piece * TILE);
    return start + piece * TILE;
}

constexpr int NO_BLOCK = 0x7fffffff;

// A block that is in some lists: its number, first token and length, and a bit for every list it is in.
struct Entry {
    int block, start, length, lists;
};

// The sorted lists of N blocks, walked as one by a whole warp: each block once. 32 entries of every list are held, one in
// each lane, so that numbers and offsets are loaded together and not one after the other. What comes from a shuffle is
// known to be the same in all lanes.
template <int N>
struct Lists {
    const int* offsets;  // first tokens of the blocks
    const int* list[N];
    int count[N], at[N];
    int block[N], start[N], length[N];  // this lane's entry
    int head[N];

    __device__ __forceinline__ explicit Lists(const int* offsets) : offsets(offsets) {}

    __device__ __forceinline__ void set(int n, const int* begin, int entries) {
        list[n] = begin;
        count[n] = entries;
        at[n] = 0;
        load(n);
    }

    __device__ __forceinline__ void load(int n) {
        int mine = at[n] + (threadIdx.x & 31);
        block[n] = NO_BLOCK;
        if (mine < count[n]) {
            block[n] = list[n][mine];
            start[n] = offsets[block[n]];
            length[n] = offsets[block[n] + 1] - start[n];
        }
        head[n] = __shfl_sync(0xffffffffu, block[n], 0);
    }

    // False at the end.
    __device__ __forceinline__ bool pop(Entry& entry) {
        entry = {head[0], 0, 0, 0};
#pragma unroll
        for (int n = 1; n < N; ++n) entry.block = min(entry.block, head[n]);
        if (entry.block == NO_BLOCK) return false;
#pragma unroll
        for (int n = 0; n < N; ++n)
            if (head[n] == entry.block) {
                entry.lists |= 1 << n;
                entry.start = __shfl_sync(0xffffffffu, start[n], at[n] & 31);
                entry.length = __shfl_sync(0xffffffffu, length[n], at[n] & 31);
                ++at[n];
                if ((at[n] & 31) == 0)
                    load(n);
                else
                    head[n] = __shfl_sync(0xffffffffu, block[n], at[n] & 31);
            }
        return true;
    }
};

// Which consumer of its team a warpgroup is, and which team; the same in all lanes, and known to be.
struct Place {
    int warpgroup, team, consumer;
    __device__ __forceinline__ Place() {
        warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
        team = warpgroup / CONSUMERS;
        consumer = warpgroup % CONSUMERS;
    }
};

// The team of a producer warp; TEAMS or more: the warp has nothing to do.
__device__ __forceinline__ int producer_team() {
    return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) - 4 * WARPGROUPS;
}

// The number of the next work item, for a whole warp.
__device__ __forceinline__ int take_item(int* next_item) {
    int number = 0;
    if ((threadIdx.x & 31) == 0) number = atomicAdd(next_item, 1);
    return __shfl_sync(0xffffffffu, number, 0);
}
