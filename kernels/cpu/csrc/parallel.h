// Threads: one parallel region a call, in the OpenMP pool that torch already has.
// Calls body(thread, num_threads) once on each of `num_threads` threads (the team may turn out smaller).
template <class Body>
static inline void parallel_run(int64_t num_threads, const Body &body) {
    if (num_threads <= 1) {
        body(0, 1);
        return;
    }
#if defined(MC_STD_THREADS)
    std::vector<std::thread> team;
    for (int i = 1; i < num_threads; i++) team.emplace_back([&, i] { body(i, (int)num_threads); });
    body(0, (int)num_threads);
    for (auto &t : team) t.join();
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
