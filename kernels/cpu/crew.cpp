// See crew.h. One loop at a time is shared; a second caller finds the crew busy and runs its own loop alone.
//
// Each thread has a range of the loop's chunks, takes those one behind another, and then what is left of the others' ranges.
// A ticket holds what a claim needs in one word, so that a thread which comes late cannot take a turn of a loop that is
// over: [24 bits: number of the loop | 20: end of the range | 20: next chunk]. As long as a claimed chunk is not done, the
// caller waits, and the description of the loop stands.

#include "crew.h"

#include <atomic>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int MOST = 255;                // helpers
constexpr long CHUNKS = (1 << 20) - 512;  // of a loop
constexpr int IDLE = 6000, WAIT = 200;   // looks, each some 17 ns, before a helper sleeps and before the caller lets others run

struct Loop {
    void (*run)(const void*, long, long);
    const void* with;
    long turns, chunk;
};

Loop loop;
struct alignas(64) Ticket { std::atomic<uint64_t> word{0}; };
Ticket tickets[MOST + 1];  // the caller's is the first, and is given out last
alignas(64) std::atomic<long> done{0};
alignas(64) std::atomic<int> wanted{0}, asleep{0};
std::atomic<uint32_t> bell{0};
std::atomic_flag busy = ATOMIC_FLAG_INIT;
int hired = 0;  // by whoever holds `busy`

uint64_t number(uint64_t t) { return t >> 40; }
long end_of(uint64_t t) { return t >> 20 & 0xFFFFF; }
long next(uint64_t t) { return t & 0xFFFFF; }

void relax() { __builtin_ia32_pause(); }

uint64_t current() { return number(tickets[0].word.load()); }

// Takes chunks until none is left, of range `mine` first.
void take_turns(int mine, int threads) {
    for (int i = 0; i < threads; ++i) {
        std::atomic<uint64_t>& word = tickets[(mine + i) % threads].word;
        for (uint64_t t = word.load(std::memory_order_acquire); next(t) < end_of(t);) {
            t = word.fetch_add(1, std::memory_order_acq_rel);
            if (next(t) >= end_of(t)) break;
            const long first = next(t) * loop.chunk, end = first + loop.chunk;
            loop.run(loop.with, first, end < loop.turns ? end : loop.turns);
            done.fetch_add(1, std::memory_order_release);
        }
    }
}

void* help(void* place) {
    const int mine = (int)(intptr_t)place;
    uint64_t seen = 0;
    for (;;) {
        int waited = 0;
        while (current() == seen || mine > wanted.load(std::memory_order_relaxed)) {
            if (++waited < IDLE) relax();
            else {  // asleep, so that it wakes on a core that is free
                asleep.fetch_add(1);
                const uint32_t rung = bell.load();
                if (current() == seen || mine > wanted.load())
                    syscall(SYS_futex, &bell, FUTEX_WAIT_PRIVATE, rung, nullptr, nullptr, 0);
                asleep.fetch_sub(1);
                waited = 0;
            }
        }
        seen = current();
        take_turns(mine, wanted.load(std::memory_order_relaxed) + 1);
    }
}

// Signals are the other threads' business.
void hire(int helpers) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    for (pthread_t thread; hired < helpers && pthread_create(&thread, nullptr, help, (void*)(intptr_t)(hired + 1)) == 0; ++hired)
        pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace

void share(long turns, long chunk, int threads, void (*run)(const void*, long, long), const void* with) {
    if (busy.test_and_set(std::memory_order_acquire)) return run(with, 0, turns);
    const int helpers = threads - 1 < MOST ? threads - 1 : MOST;
    if (hired < helpers) hire(helpers);
    if (turns / chunk >= CHUNKS) chunk = turns / CHUNKS + 1;
    const long count = (turns + chunk - 1) / chunk;
    loop = {run, with, turns, chunk};
    done.store(0, std::memory_order_relaxed);
    wanted.store(helpers, std::memory_order_relaxed);
    const uint64_t here = (current() + 1) & 0xFFFFFF;
    for (int i = helpers; i >= 0; --i) {
        const long first = count * i / (helpers + 1), end = count * (i + 1) / (helpers + 1);
        tickets[i].word.store(here << 40 | (uint64_t)end << 20 | (uint64_t)first);
    }
    if (asleep.load()) {
        bell.fetch_add(1);
        syscall(SYS_futex, &bell, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }
    take_turns(0, helpers + 1);
    for (int waited = 0; done.load(std::memory_order_acquire) != count;)
        if (++waited < WAIT) relax();
        else sched_yield();
    busy.clear(std::memory_order_release);
}
