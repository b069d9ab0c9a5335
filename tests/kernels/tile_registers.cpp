// Exits with 0 if a thread has the shapes of its tile registers back after the kernels used them.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#define MC_WIDTH 16
#define MC_INLINE static inline __attribute__((always_inline))
#define MC_MEMBER inline __attribute__((always_inline))
#include "tiles.h"

struct alignas(64) Shapes {
    uint8_t bytes[64] = {};
};

static Shapes now() {
    Shapes shapes;
    settle_memory(&shapes);
    _tile_storeconfig(&shapes);
    settle_memory(&shapes);
    return shapes;
}

static bool use(int rows) {
    TileRegisters registers;
    registers.set_rows(rows);
    return now().bytes[48] == rows;
}

int main() {
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return 1;
    Shapes none, before;
    before.bytes[0] = 1;                          // the palette
    before.bytes[16] = 32, before.bytes[48] = 5;  // bytes of a row, and rows, of register 0
    if (!use(7) || memcmp(now().bytes, none.bytes, 64)) return 2;
    settle_memory(&before);
    _tile_loadconfig(&before);
    if (!use(16) || memcmp(now().bytes, before.bytes, 64)) return 3;
    _tile_release();
    return 0;
}
