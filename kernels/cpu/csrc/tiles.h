// AMX: a thread's eight tile registers of up to 16 rows of 64 bytes, and products of bfloat16 matrices in them.
//
// `TDPBF16PS c, a, b` adds to c[row][column], float32, the products of a[row] (32 values) with b's column, which lies as
// 16 rows of pairs: b[pair][column] holds values 2 * pair and 2 * pair + 1. Registers 0 to 3 are sums, 4 holds a, and 5
// and 6 take turns with b.

// The compiler does not know what tile instructions read and write: before and after them all memory is what it seems,
// that behind `p` included.
MC_INLINE void settle_memory(const void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// Shapes of the registers: a and the sums have `rows` rows. The shapes that the thread had before come back at the end.
class TileRegisters {
    struct alignas(64) Shapes {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };
    Shapes before;
    int rows_now = 0;

  public:
    TileRegisters() {
        settle_memory(&before);
        _tile_storeconfig(&before);
        settle_memory(&before);
    }
    ~TileRegisters() {
        if (!rows_now) return;
        if (before.palette)
            _tile_loadconfig(&before);
        else
            _tile_release();
    }
    TileRegisters(const TileRegisters &) = delete;
    TileRegisters &operator=(const TileRegisters &) = delete;

    // Forgets what is in the registers, unless they have these shapes already.
    void set_rows(int rows) {
        if (rows == rows_now) return;
        Shapes shapes;
        for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = (uint8_t)(i < 5 ? rows : 16);
        settle_memory(&shapes);
        _tile_loadconfig(&shapes);
        settle_memory(&shapes);
        rows_now = rows;
    }
};

// Sums of up to four tiles side by side: `rows` of a times b, over `steps` times 32 values.
struct TileProduct {
    const char *a, *b;
    int64_t a_stride, a_step;            // bytes: between rows, between steps
    int64_t b_stride, b_step, b_column;  // between rows of pairs, between steps, between tiles side by side
    float *c;
    int64_t c_stride, steps;  // bytes; sums 16 columns apart are next to each other

    // Sums in brackets: the intrinsics of gcc 11 are macros that cast what comes first.
    template <int TILES, bool ADD>
    MC_MEMBER void run() const {
        settle_memory(c);
        if (ADD) {
            _tile_loadd(0, c, c_stride);
            if (TILES > 1) _tile_loadd(1, (c + 16), c_stride);
            if (TILES > 2) _tile_loadd(2, (c + 32), c_stride);
            if (TILES > 3) _tile_loadd(3, (c + 48), c_stride);
        } else {
            _tile_zero(0);
            if (TILES > 1) _tile_zero(1);
            if (TILES > 2) _tile_zero(2);
            if (TILES > 3) _tile_zero(3);
        }
        const char *left = a, *right = b;
        for (int64_t s = 0; s < steps; s++, left += a_step, right += b_step) {
            _tile_loadd(4, left, a_stride);
            _tile_loadd(5, right, b_stride);
            _tile_dpbf16ps(0, 4, 5);
            if (TILES > 1) {
                _tile_loadd(6, (right + b_column), b_stride);
                _tile_dpbf16ps(1, 4, 6);
            }
            if (TILES > 2) {
                _tile_loadd(5, (right + 2 * b_column), b_stride);
                _tile_dpbf16ps(2, 4, 5);
            }
            if (TILES > 3) {
                _tile_loadd(6, (right + 3 * b_column), b_stride);
                _tile_dpbf16ps(3, 4, 6);
            }
        }
        _tile_stored(0, c, c_stride);
        if (TILES > 1) _tile_stored(1, (c + 16), c_stride);
        if (TILES > 2) _tile_stored(2, (c + 32), c_stride);
        if (TILES > 3) _tile_stored(3, (c + 48), c_stride);
        settle_memory(c);
    }

    template <bool ADD>
    MC_MEMBER void run(int tiles) const {
        switch (tiles) {
            case 1: return run<1, ADD>();
            case 2: return run<2, ADD>();
            case 3: return run<3, ADD>();
            default: return run<4, ADD>();
        }
    }
};
