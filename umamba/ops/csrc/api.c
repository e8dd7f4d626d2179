/* The exported functions: choose the instruction set once, then call its kernels. */
#include <string.h>

#include "umamba.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

static const Kernels *kernels;

#if defined(__x86_64__)
extern const Kernels kernels_v2, kernels_v3, kernels_v4;

static int has_v2(void) { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"); }
static int has_v3(void) {
    return has_v2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
           && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
static int has_v4(void) {
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
           && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
           && __builtin_cpu_supports("avx512vl");
}

static const struct {
    const char *name;
    const Kernels *table;
    int (*present)(void);
} choices[] = {{"v4", &kernels_v4, has_v4}, {"v3", &kernels_v3, has_v3}, {"v2", &kernels_v2, has_v2}};
#else
extern const Kernels kernels_base;

static int has_base(void) { return 1; }

static const struct {
    const char *name;
    const Kernels *table;
    int (*present)(void);
} choices[] = {{"base", &kernels_base, has_base}};
#endif

/* A digest of the sources: a library that is older than they are must not be called. */
EXPORT const char *umamba_sources(void) { return UMAMBA_SOURCES; }

/* Takes the named instruction set, or the best one for an empty name; returns its name, or NULL. */
EXPORT const char *umamba_select(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    for (unsigned i = 0; i < sizeof choices / sizeof *choices; i++)
        if ((!*name || !strcmp(name, choices[i].name)) && choices[i].present()) {
            kernels = choices[i].table;
            return choices[i].name;
        }
    return NULL;
}

EXPORT int umamba_scan_forward(const ScanForward *s) {
    return kernels ? kernels->scan_forward(s) : STATUS_NO_ISA;
}
EXPORT int umamba_scan_backward(const ScanBackward *s) {
    return kernels ? kernels->scan_backward(s) : STATUS_NO_ISA;
}
EXPORT int umamba_conv_forward(const Conv *s) {
    return kernels ? kernels->conv_forward(s) : STATUS_NO_ISA;
}
EXPORT int umamba_conv_backward(const Conv *s) {
    return kernels ? kernels->conv_backward(s) : STATUS_NO_ISA;
}
EXPORT int umamba_add_tile(const AddTile *s) { return kernels ? kernels->add_tile(s) : STATUS_NO_ISA; }
EXPORT int umamba_linear_argmax(const LinearArgmax *s) {
    return kernels ? kernels->linear_argmax(s) : STATUS_NO_ISA;
}
