/* A small pool of threads that survives fork and gives work out item by item.
 *
 * Which thread takes an item never changes a result: the split into items depends on shapes only.
 * A caller that finds the pool busy (another Python thread is in it) does its items alone. */
#include <stdatomic.h>

#include "umamba.h"

#if defined(__SSE2__)
#include <immintrin.h>
/* Decaying states reach subnormal numbers, which cost a hundred cycles each: flush them here,
 * and give the caller's setting back. */
static unsigned flush_subnormals(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}
static void restore_subnormals(unsigned before) { _mm_setcsr(before); }
/* Streamed stores are seen by the other threads from here on. */
static void fence_stores(void) { _mm_sfence(); }
#else
static unsigned flush_subnormals(void) { return 0; }
static void restore_subnormals(unsigned before) { (void)before; }
static void fence_stores(void) {}
#endif

typedef void (*Work)(void *context, int64_t item, int64_t worker);

static void run_items(Work work, void *context, atomic_llong *next, int64_t n_items, int64_t worker) {
    const unsigned before = flush_subnormals();
    for (int64_t item; (item = atomic_fetch_add(next, 1)) < n_items;) work(context, item, worker);
    fence_stores();
    restore_subnormals(before);
}

#if defined(_WIN32)
void umamba_parallel(int64_t n_threads, int64_t n_items, Work work, void *context) {
    atomic_llong next = 0;
    (void)n_threads;
    run_items(work, context, &next, n_items, 0);
}
#else
#include <pthread.h>
#include <signal.h>

#define MAX_HELPERS 255

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER; /* held for the length of a job */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;   /* guards everything below */
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static int64_t n_helpers, places, active, next_worker;
static uint64_t generation;
static Work job_work;
static void *job_context;
static int64_t job_items;
static atomic_llong job_next;

static void *helper(void *argument) {
    uint64_t seen = (uint64_t)(uintptr_t)argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (places == 0 || seen == generation) pthread_cond_wait(&wake, &lock);
        seen = generation;
        places--;
        active++;
        const int64_t worker = next_worker++;
        pthread_mutex_unlock(&lock);
        run_items(job_work, job_context, &job_next, job_items, worker);
        pthread_mutex_lock(&lock);
        if (--active == 0) pthread_cond_signal(&done);
    }
    return NULL;
}

/* The threads of the parent do not exist in a forked child: it starts with an empty pool. */
static void forget_pool(void) {
    pthread_mutex_t fresh_mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t fresh_condition = PTHREAD_COND_INITIALIZER;
    in_use = lock = fresh_mutex;
    wake = done = fresh_condition;
    n_helpers = places = active = 0;
}

__attribute__((constructor)) static void register_fork_handler(void) {
    pthread_atfork(NULL, NULL, forget_pool);
}

static void add_helpers(int64_t wanted) {
    pthread_attr_t detached;
    pthread_t thread;
    sigset_t all, before; /* signals belong to the host's threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    while (n_helpers < smaller(wanted, MAX_HELPERS)) {
        if (pthread_create(&thread, &detached, helper, (void *)(uintptr_t)generation)) break;
        n_helpers++;
    }
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void umamba_parallel(int64_t n_threads, int64_t n_items, Work work, void *context) {
    const int64_t helpers = smaller(n_threads, n_items) - 1;
    if (helpers < 1 || pthread_mutex_trylock(&in_use)) {
        atomic_llong next = 0;
        run_items(work, context, &next, n_items, 0);
        return;
    }
    pthread_mutex_lock(&lock);
    add_helpers(helpers);
    job_work = work;
    job_context = context;
    job_items = n_items;
    atomic_store(&job_next, 0);
    generation++;
    next_worker = 1;
    places = helpers;
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);

    run_items(work, context, &job_next, n_items, 0);

    pthread_mutex_lock(&lock);
    places = 0; /* who has not come by now is not waited for */
    while (active) pthread_cond_wait(&done, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&in_use);
}
#endif
