// An instantiation by itself, so that the build runs in parallel.
#include "dispatch.h"

template void llava_st::cuda::launch_lape_add_sums(const SumArguments<BFloat16>&, bool, void*);
template void llava_st::cuda::launch_lape_add_finish(const FinishArguments<BFloat16>&, void*);
