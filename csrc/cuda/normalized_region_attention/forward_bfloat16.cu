// An instantiation by itself, so that the build runs in parallel.
#include "dispatch.h"

template void llava_st::cuda::launch_normalized_forward(const NormalizedForwardArguments<BFloat16>&, void*);
