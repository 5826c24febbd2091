// Leaf functions compiled once per instruction set and chosen when the library is loaded, so one
// wheel runs everywhere. A leaf is a plain loop over always-inline bodies.
#pragma once

#include <cstdlib>  // defines __GLIBC__ where the loader is glibc's, which ifuncs need

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define SALIENCY_FAST_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SALIENCY_FAST_CLONES
#endif

#if defined(__GNUC__)
#define SALIENCY_FAST_INLINE static inline __attribute__((always_inline))
#else
#define SALIENCY_FAST_INLINE static inline
#endif
