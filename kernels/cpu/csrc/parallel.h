// Threads: one parallel region a call, in the OpenMP pool that torch already has.

// While it lives, this thread takes float32 numbers below 2^-126 for 0. Exponentials of far scores are such numbers, and
// processors that handle them in microcode need 80 times as long for attention that is sure of itself.
struct FlushSubnormals {
#if defined(__SSE__)
    const unsigned before = __builtin_ia32_stmxcsr();
    FlushSubnormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }  // flush to zero, denormals are zero
    ~FlushSubnormals() { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    FlushSubnormals() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before));
        __asm__ volatile("msr fpcr, %0" : : "r"(before | 1u << 24));
    }
    ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }
#else
    FlushSubnormals() {}
#endif
};

// Calls work(thread, num_threads) once on each of `num_threads` threads (the team may turn out smaller).
template <class Work>
static inline void parallel_run(int64_t num_threads, const Work &work) {
    const auto body = [&](int thread, int count) {
        FlushSubnormals flush;
        work(thread, count);
    };
    if (num_threads <= 1) {
        body(0, 1);
        return;
    }
#if defined(MC_STD_THREADS)
    std::vector<std::thread> team;
    for (int i = 1; i < num_threads; i++) team.emplace_back([&, i] { body(i, (int)num_threads); });
    body(0, (int)num_threads);
    for (auto &t : team) t.join();
#elif defined(MC_GOMP)
    // What `#pragma omp parallel` is to g++; said by name, clang too uses the pool of the libgomp that torch has loaded.
    using Body = decltype(body);
    GOMP_parallel([](void *data) { (*(const Body *)data)(omp_get_thread_num(), omp_get_num_threads()); },
                  (void *)&body, (unsigned)num_threads, 0);
#elif defined(_OPENMP)
#pragma omp parallel num_threads((int)num_threads)
    body(omp_get_thread_num(), omp_get_num_threads());
#else
    body(0, 1);
#endif
}

// Hands out 0, 1, 2, ... to the threads of a region.
struct Counter {
    int64_t value = 0;
    int64_t next() { return __atomic_fetch_add(&value, 1, __ATOMIC_RELAXED); }
};

// Memory aligned to a cache line, freed at the end of the scope. `ok()` is false where there was none.
struct Scratch {
    char *data = nullptr;
    size_t used = 0, size = 0;
    explicit Scratch(size_t bytes) : size(bytes) {
        if (posix_memalign((void **)&data, 64, bytes ? bytes : 64)) data = nullptr;
    }
    ~Scratch() { free(data); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    bool ok() const { return data != nullptr; }
    template <class T>
    T *take(size_t count) {
        T *p = (T *)(data + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

// Hands out 0, 1, 2, ... too, but each thread goes through a stretch of its own in order, as long as there is one, so
// that what it asked for ahead in memory is what it works on next; then it helps with the others'.
struct Stretches {
    struct alignas(64) Stretch { int64_t next; };
    Stretch *stretches;
    int64_t total, parts;
    static size_t bytes(int64_t parts) { return parts * sizeof(Stretch); }
    Stretches(Scratch &memory, int64_t total, int64_t parts)
        : stretches(memory.take<Stretch>(parts)), total(total), parts(parts) {
        for (int64_t i = 0; i < parts; i++) stretches[i].next = total * i / parts;
    }
    template <class Body>
    void run(int thread, const Body &body) {
        for (int64_t i = 0; i < parts; i++) {
            int64_t part = (thread + i) % parts, end = total * (part + 1) / parts;
            for (int64_t c; (c = __atomic_fetch_add(&stretches[part].next, 1, __ATOMIC_RELAXED)) < end;) body(c);
        }
    }
};
