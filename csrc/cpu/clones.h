// One wheel for every x86-64: the loader picks the widest version of each marked loop. It needs the
// ifunc relocations of ELF and glibc, and the marked functions may not hold an OpenMP region (the
// outlined body would be compiled for the baseline), so `split` only calls them.
#pragma once

#if defined(LOWRANK_CPU_DISPATCH) && defined(__x86_64__) && defined(__ELF__) && \
    defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define LOWRANK_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef LOWRANK_CLONES
#define LOWRANK_CLONES
#define LOWRANK_NO_CLONES
#endif

// For lambdas that marked functions call: left on their own, they would be for the baseline.
#define LOWRANK_INLINE __attribute__((always_inline))
