/* The kernels of one instruction set; compiled once for each, with KERNELS naming the table. */
#include "conv.h"
#include "scan_backward.h"
#include "scan_local.h"
#include "volume.h"

extern const Kernels KERNELS;
const Kernels KERNELS = {LANES,         scan_forward, scan_backward, conv_forward,
                         conv_backward, add_tile,     linear_argmax};
