// An instantiation by itself, so that the build runs in parallel.
#include "dispatch.h"

template void llava_st::cuda::launch_normalized_forward(const NormalizedForwardArguments<float>&, void*);
