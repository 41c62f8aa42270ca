"""Hopper kernels of plain loads and stores in which no thread reads what another wrote, but in sums of all of them."""

import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.vary import vary_alike


def run(name: str, body, grid: dict[str, int], out, *args, approximate: bool = False):
    """body(*refs of args, *refs of out) for every point of the grid, an axis index by its name; out: shapes and dtypes.

    Results vary over the mesh axes that any of args does. approximate: see `hopper.launch`.
    """
    kernel = plgpu.kernel(
        body,
        out_type=out,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            approx_math=approximate,
            unsafe_no_auto_barriers=True,  # sums have their own
        ),
    )
    # the kernel's own types know of no mesh
    return vary_alike(kernel(*args), args)[0]
