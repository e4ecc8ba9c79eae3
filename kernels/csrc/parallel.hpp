// A loop cut over threads: OpenMP's where the process has them already, as one with torch has, for two pools that watch
// for work fight over the cores; else a pool's that lives as long as the process. Who does which piece never changes a
// result.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace tintype {

// More are worth nothing to these loops, and OpenMP ends a process to which the system refuses one.
constexpr int kMostThreads = 256;

class ThreadPool {
public:
    // Leaked on purpose: at exit its threads may be gone already, and joining them would hang a forked child.
    static ThreadPool& instance() {
        static ThreadPool* pool = new ThreadPool;
        return *pool;
    }

    int threads() const { return threads_.load(); }
    void set_threads(int count) { threads_.store(std::clamp(count, 1, kMostThreads)), asked_ = true; }

    // From now on OpenMP's threads work, where a loaded library of it is found, or the pool's own; whether OpenMP's do.
    bool share_openmp([[maybe_unused]] bool share) {
        Team found = nullptr;
#if !defined(_WIN32)
        if (share) found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
        openmp_ = found;
        return found != nullptr;
    }

    // Calls piece(i) for each i below `pieces`; one caller at a time has the pool, another runs its own loop alone.
    void run(std::size_t pieces, const std::function<void(std::size_t)>& piece) {
        const Team team = openmp_;
        if (team && threads() > 1 && !forked()) return run_in(team, pieces, piece);
        const std::size_t helpers = std::min<std::size_t>(static_cast<std::size_t>(threads()), pieces) - (pieces ? 1 : 0);
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (helpers == 0 || !owner.owns_lock() || forked()) {
            for (std::size_t i = 0; i < pieces; ++i) piece(i);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (workers_ < helpers && start_worker()) continue;
            piece_ = &piece, pieces_ = pieces, next_ = 0, invited_ = std::min(helpers, workers_);
            ++round_;
        }
        wake_.notify_all();
        take_pieces();
        {
            std::lock_guard<std::mutex> lock(mutex_);
            invited_ = 0;  // whoever has not come by now finds nothing to do
        }
        linger([this] { return working_ == 0; });
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return working_ == 0; });
    }

private:
    // Runs a function on every thread of a team of so many; 0 is as many as OpenMP was told.
    using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

    struct Loop {
        const std::function<void(std::size_t)>& piece;
        const std::size_t pieces;
        std::atomic<std::size_t> next{0};
    };

    void run_in(Team team, std::size_t pieces, const std::function<void(std::size_t)>& piece) {
        Loop loop{piece, pieces};
        const auto take = [](void* given) {
            Loop& shared = *static_cast<Loop*>(given);
            for (std::size_t i = shared.next++; i < shared.pieces; i = shared.next++) shared.piece(i);
        };
        team(take, &loop, asked_ ? static_cast<unsigned>(threads()) : 0, 0);
    }

    // A forked child has the pool's memory and none of its threads.
    bool forked() const {
#if defined(_WIN32)
        return false;
    }
#else
        return process_ != getpid();
    }
    const pid_t process_ = getpid();
#endif

    ThreadPool() {
        const char* wanted = std::getenv("TINTYPE_NUM_THREADS");
        char* rest = nullptr;
        long asked = wanted ? std::strtol(wanted, &rest, 10) : 0;
        if (rest && *rest) asked = 0;  // no number: native.py tells
        const long count = asked > 0 ? asked : static_cast<long>(std::thread::hardware_concurrency());
        set_threads(static_cast<int>(std::min<long>(count, kMostThreads)));
        asked_ = asked > 0;
    }

    // Whether the system gave one more thread; without it those that there are do the work.
    bool start_worker() {
        try {
            std::thread([this, seen = round_.load()] { work(seen); }).detach();
        } catch (const std::system_error&) {
            return false;
        }
        ++workers_;
        return true;
    }

    void work(std::size_t seen) {
        for (;;) {
            linger([&] { return round_ != seen; });
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return round_ != seen; });
                seen = round_;
                if (invited_ == 0) continue;
                --invited_, ++working_;
            }
            take_pieces();
            std::lock_guard<std::mutex> lock(mutex_);
            if (--working_ == 0) done_.notify_one();
        }
    }

    // Watches a while for what mostly comes at once: to be woken takes longer than many a loop.
    template <class Ready>
    static void linger(Ready ready) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
        while (!ready() && std::chrono::steady_clock::now() < until) continue;
    }

    void take_pieces() {
        for (std::size_t i = next_++; i < pieces_; i = next_++) (*piece_)(i);
    }

    std::atomic<int> threads_{1};
    std::atomic<bool> asked_{false};
    std::atomic<Team> openmp_{nullptr};
    std::mutex owner_, mutex_;
    std::condition_variable wake_, done_;
    std::size_t workers_ = 0, invited_ = 0, pieces_ = 0;
    std::atomic<std::size_t> next_{0}, working_{0}, round_{0};
    const std::function<void(std::size_t)>* piece_ = nullptr;
};

// Below this many bytes waking a thread costs more than it saves.
constexpr std::size_t kParallelBytes = std::size_t{1} << 18;

inline void parallel_for(std::size_t pieces, std::size_t bytes, const std::function<void(std::size_t)>& piece) {
    if (bytes >= kParallelBytes) return ThreadPool::instance().run(pieces, piece);
    for (std::size_t i = 0; i < pieces; ++i) piece(i);
}

}  // namespace tintype
