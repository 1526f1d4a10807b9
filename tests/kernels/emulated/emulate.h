// CUDA's part of the low-bit kernels on a CPU: a thread for a lane, barriers for what a warp or a block does together.
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
typedef uint32_t u32;
typedef uint16_t u16;
typedef long long i64;
typedef uint64_t u64;
struct uint4 { u32 x, y, z, w; };
struct uint2 { u32 x, y; };
struct Index { int x, y, z; };
static thread_local Index threadIdx, blockIdx;
#ifdef TOKENS
#define TOGETHER SPREAD  // blocks of a cluster
#else
#define TOGETHER 1
#define CONSUMERS 0
#define SHARED_WORDS 0
#endif
// PTX ISA, "barrier" (sixteen of them) and "mbarrier": how often all have come, and how many have since.
struct Meeting {
    std::mutex mutex;
    std::condition_variable all_here;
    int count = 0, here = 0, times = 0;
    int come(int wanted) {  // in which time
        std::unique_lock<std::mutex> lock(mutex);
        const int now = times;
        if (++here == wanted) {
            here = 0;
            ++times;
            all_here.notify_all();
        }
        return now;
    }
    template <class Test> void wait(Test test) {
        std::unique_lock<std::mutex> lock(mutex);
        all_here.wait(lock, [&] { return test(times); });
    }
};
#ifdef TOKENS
#define GATES (2 * STAGES)
#else
#define GATES 1
#endif
// What the threads of a block share.
struct Block {
    std::barrier<> whole{32 * WARPS};
    std::unique_ptr<std::barrier<>> warps[WARPS], groups[CONSUMERS + 1];
    u32 operands[WARPS][32][6];
    Meeting barriers[16], gates[GATES];
    alignas(1024) u16 memory[SHARED_WORDS + 1];
    Block() {
        for (auto &warp : warps) warp = std::make_unique<std::barrier<>>(32);
        for (auto &group : groups) group = std::make_unique<std::barrier<>>(128);
    }
};
static std::unique_ptr<Block> blocks[TOGETHER];
static thread_local Block *own_block;
#define SHARED static
#define INLINE static inline
#define KERNEL(...) static void
#define __syncthreads() own_block->whole.arrive_and_wait()
static inline int min(int a, int b) { return a < b ? a : b; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
static inline u32 bits_of(float f) { u32 v; memcpy(&v, &f, 4); return v; }
static inline uint4 load_once(const uint4 *from) { return *from; }
static inline u32 and_or(u32 a, u32 mask, u32 bits) { return (a & mask) | bits; }
static inline u32 bytes_of(u32 a, u32 b, u32 which) {
    const uint64_t both = ((uint64_t)b << 32) | a;
    u32 v = 0;
    for (int i = 0; i < 4; ++i) v |= (u32)((both >> (8 * ((which >> (4 * i)) & 7))) & 0xff) << (8 * i);
    return v;
}
#if HALF
static inline float wide(u16 a) { _Float16 h; memcpy(&h, &a, 2); return (float)h; }
static inline u16 narrow(float f) { _Float16 h = (_Float16)f; u16 v; memcpy(&v, &h, 2); return v; }
#else
static inline float wide(u16 a) { return __uint_as_float((u32)a << 16); }
static inline u16 narrow(float f) {
    if (f != f) return 0x7fff;
    const u32 v = bits_of(f);
    return (u16)((v + 0x7fff + ((v >> 16) & 1)) >> 16);
}
#endif
static inline u32 pair(float low, float high) { return narrow(low) | ((u32)narrow(high) << 16); }
static inline u32 minus(u32 a, u32 b) {
    return pair(wide(a & 0xffff) - wide(b & 0xffff), wide(a >> 16) - wide(b >> 16));
}
// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": which element each register's half is.
static inline void multiply(float *d, const u32 *a, u32 b0, u32 b1) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u32 *own = own_block->operands[warp][lane];
    for (int i = 0; i < 4; ++i) own[i] = a[i];
    own[4] = b0;
    own[5] = b1;
    own_block->warps[warp]->arrive_and_wait();
    for (int c = 0; c < 4; ++c) {
        const int row = (lane >> 2) + 8 * (c >> 1), column = 2 * (lane & 3) + (c & 1);
        float total = 0.0f;
        for (int k = 0; k < 16; ++k) {
            const int holder = (k % 8) / 2, half = 16 * (k & 1), upper = k / 8;
            const u32 weight = own_block->operands[warp][4 * (row % 8) + holder][(row >= 8) + 2 * upper] >> half;
            const u32 input = own_block->operands[warp][4 * column + holder][4 + upper] >> half;
            total += wide(weight & 0xffff) * wide(input & 0xffff);
        }
        d[c] += total;
    }
    own_block->warps[warp]->arrive_and_wait();
}
static void wait_for_earlier() {}
static void let_next_start() {}
#ifdef TOKENS
static void open_products() {}
static void queue_products() {}
#define wait_for_products(left)
#define TAKE_REGISTERS
#define GIVE_REGISTERS
static void keep(u32 (*)[4]) {}
static void settle(float *) {}
static u16 *shared_memory() { return own_block->memory; }
static void sync_at(int barrier, int count) {
    Meeting &own = own_block->barriers[barrier];
    const int now = own.come(count);
    own.wait([now](int times) { return times != now; });
}
static void make_gate(int gate, int count) { own_block->gates[gate].count = count; }
static void come_to(int gate) { own_block->gates[gate].come(own_block->gates[gate].count); }
static void come_when_copied(int gate) { come_to(gate); }
static void show_gates() {}
static void copy_piece(int gate, u32 address, const char *from, int bytes) {
    memcpy((char *)own_block->memory + address, from, bytes);
    come_to(gate);
}
// Open once more than it was when the parity was the other.
static void wait_at(int gate, u32 parity) {
    own_block->gates[gate].wait([parity](int times) { return (u32)(times & 1) != parity; });
}
static u32 address_of(const u16 *shared) { return (u32)((char *)shared - (char *)own_block->memory); }
static void copy_pair(u32 address, const char *from, bool is_there) {
    char *to = (char *)own_block->memory + address;
    if (is_there)
        memcpy(to, from, 4);
    else
        memset(to, 0, 4);
}
// Of a cluster: the threads that are still there, those of one warpgroup for each of its rows.
#define CLUSTER
static std::unique_ptr<std::barrier<>> cluster;
static void sync_cluster() { cluster->arrive_and_wait(); }
static float of_block(const float *own, int block) {
    const float *theirs = own + ((float *)blocks[block]->memory - (float *)own_block->memory);
    return *theirs;
}
static inline u32 times(u32 a, u32 b) {
    return pair(wide(a & 0xffff) * wide(b & 0xffff), wide(a >> 16) * wide(b >> 16));
}
// PTX ISA, "Register fragments for wgmma.mma_async.m64k16" (A: as mma's, a warp every 16 rows) and "Shared memory matrix
// layout": rows of 128 bytes whose 16-byte pieces are exchanged by the row's place among eight.
static inline u64 described(const u16 *tiles) { return (u64)tiles; }
static inline void multiply_group(float *d, const u32 *a, u64 tiles, int stage, int step) {
    const u16 *tile = (const u16 *)tiles + 64 * TOKENS * stage;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int i = 0; i < 4; ++i) own_block->operands[warp][lane][i] = a[i];
    own_block->groups[warp / 4]->arrive_and_wait();
    for (int j = 0; j < TOKENS / 8; ++j)
        for (int c = 0; c < 4; ++c) {
            const int row = (lane >> 2) + 8 * (c >> 1), token = 8 * j + 2 * (lane & 3) + (c & 1);
            float total = 0.0f;
            for (int k = 0; k < 16; ++k) {
                const u32 weight = own_block->operands[warp][4 * (row % 8) + (k % 8) / 2][(row >= 8) + 2 * (k / 8)] >> (16 * (k & 1));
                const int piece = (2 * step + k / 8) ^ (token & 7);
                total += wide(weight & 0xffff) * wide(tile[64 * token + 8 * piece + k % 8]);
            }
            d[4 * j + c] += total;
        }
    own_block->groups[warp / 4]->arrive_and_wait();
}
#endif
// A grid, cluster after cluster.
template <class Body> static void run_grid(int blocks_x, int blocks_y, int blocks_z, Body body) {
    for (int index = 0; index < blocks_x * blocks_y; ++index) {
        std::vector<std::thread> threads;
        for (auto &block : blocks) block = std::make_unique<Block>();
#ifdef TOKENS
        cluster = std::make_unique<std::barrier<>>(128 * WGS * SPREAD);
#endif
        for (int bz = 0; bz < blocks_z; ++bz)
            for (int t = 0; t < 32 * WARPS; ++t)
                threads.emplace_back([=] {
                    threadIdx = {t, 0, 0};
                    blockIdx = {index % blocks_x, index / blocks_x, bz};
                    own_block = blocks[bz].get();
                    body();
                });
        for (auto &thread : threads) thread.join();
    }
}
