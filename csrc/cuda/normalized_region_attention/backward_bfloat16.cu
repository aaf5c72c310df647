// An instantiation by itself, so that the build runs in parallel.
#include "dispatch.h"

template void llava_st::cuda::launch_normalized_backward(const NormalizedBackwardArguments<BFloat16>&, int64_t, void*);
