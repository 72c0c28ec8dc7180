// The kernels of the emulator's own tests.
#include "emulation/selftest.cuh"

#include "export_kernels.h"

DLM_EXPORT_KERNELS(selftest)
