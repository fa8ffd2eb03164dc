// Threads that share a loop's turns with the one that calls.
//
// A turn is taken by whoever is free, and the caller waits only for turns that somebody has taken: a thread that another
// process keeps off its core costs what it could have done, not the wait for it. So a step takes its time beside busy
// API workers and clients, where OpenMP's barriers, at which all threads must arrive, took twice as long.

#pragma once

// run(with, first, end) for all of 0 <= first < end <= turns, `chunk` turns at a time, on up to `threads` threads.
void share(long turns, long chunk, int threads, void (*run)(const void*, long, long), const void* with);

// work(first, end) likewise; `threads` 1: here and now.
template <class Work> void each(long turns, long chunk, int threads, const Work& work) {
    if (threads < 2 || turns <= chunk) {
        if (turns > 0) work(0, turns);
        return;
    }
    share(turns, chunk, threads, [](const void* with, long first, long end) { (*(const Work*)with)(first, end); }, &work);
}

// A chunk of `turns` that are equally long: few of them for each thread.
inline long part_of(long turns, int threads) { return (turns + 4 * threads - 1) / (4 * threads); }
