// An instantiation by itself, so that the build runs in parallel.
#include "dispatch.h"

template void llava_st::cuda::launch_resize(const ResizeArguments<Float16>&, void*);
template void llava_st::cuda::launch_lape_add(const AddArguments<Float16>&, bool, bool, bool, void*);
