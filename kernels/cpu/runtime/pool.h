// A pool of threads that share the tasks of one operation at a time; the caller is one of them. (Not OpenMP's, which
// torch uses: see docs/decisions/010-threads-of-a-rank.md.)
#pragma once

#include <cstdint>
#include <vector>

namespace phalanx {

using Task = void (*)(void* context, int task);

// Threads that later operations use, the caller included; at least 1. Waits for an operation that is under way.
// With `cpus`, one for each thread, thread i runs on cpus[i] alone, except the caller, thread 0, which belongs to
// somebody else. Returns 0, or the system's error number if a thread may not: then they all run where the system puts
// them, as without `cpus`.
int set_threads(int threads, const std::vector<int>& cpus = {});
int threads();

// Whether each of them has a CPU of its own.
bool bound();

// Run task(context, i) for each i below `tasks`, in any order, on all threads; returns when all are done. Throws what
// the first task that failed threw, whichever thread it was on; the others are done then too, or have failed as well.
// Called by two threads at once, the second runs its tasks by itself.
void run_tasks(int tasks, Task task, void* context);

// What a thread does when it has no more tasks: one of the pool before it sleeps, the caller's before run_tasks()
// returns, since what the caller does next may be another library's. Null for nothing.
void set_idle(void (*idle)());

// run_tasks() of a function object, which lives until all tasks are done.
template <class F>
void parallel(int tasks, const F& body) {
    run_tasks(tasks, [](void* context, int task) { (*static_cast<const F*>(context))(task); }, const_cast<F*>(&body));
}

}  // namespace phalanx
