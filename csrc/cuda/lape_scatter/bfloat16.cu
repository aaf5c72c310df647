// An instantiation by itself, so that the build runs in parallel.
#include "dispatch.h"

template void llava_st::cuda::launch_lape_scatter(const ScatterArguments<BFloat16>&, void*);
template void llava_st::cuda::launch_lape_scatter_backward(const GatherArguments<BFloat16>&, void*);
