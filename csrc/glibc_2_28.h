// setup.py includes this file before every C++ file, so that a binary that was built on a newer
// Linux loads with glibc 2.28 too, the oldest that torch's wheels support. Where glibc has two
// versions of a function, it names the older one, which later versions of glibc keep. `make wheel`
// checks it.
#pragma once
#if defined(__linux__) && defined(__x86_64__)
#include <features.h>
#if defined(__GLIBC__)

__asm__(".symver log,log@GLIBC_2.2.5");      // the newer one sets no errno
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");  // the newer one is in libc.so instead of libdl.so

extern "C" {
// In glibc 2.32 and later: whether the process has one thread. std::shared_ptr then counts without
// atomic operations. This variable, which only this binary sees, always says no.
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}

#endif
#endif
