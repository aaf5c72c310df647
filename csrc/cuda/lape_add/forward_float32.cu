// An instantiation by itself, so that the build runs in parallel.
#include "dispatch.h"

template void llava_st::cuda::launch_resize(const ResizeArguments<float>&, void*);
template void llava_st::cuda::launch_lape_add(const AddArguments<float>&, bool, bool, bool, void*);
