"""The fused operators as part of torch: checks of their registration, compilation, vmap, autocast, devices."""
import pytest
import torch

import kernels
from kernels import common, reference

CUDA = torch.cuda.is_available()
TRIPLETS = torch.tensor([[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [5, 6, 7]])


def random_maps(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_poses(*lead, keypoints=8, seed=0):
    return 128 + 60 * torch.randn(*lead, keypoints, 2, generator=torch.Generator().manual_seed(seed))


def random_mask(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.2


# --- torch.library ------------------------------------------------------------------------------------------

def operator_calls(device):
    maps = random_maps((2, 3, 7, 5)).to(device)
    source, target = random_poses(4).to(device), random_poses(3, seed=1).to(device)
    valid, triplets = random_mask(4, 8).to(device), TRIPLETS.to(device)
    operators = torch.ops.actupose
    channels_last = maps.contiguous(memory_format=torch.channels_last)
    for layout in (maps, channels_last, maps.half(), maps[:, :1].expand(2, 3, 7, 5)):
        yield operators.heatmap_argmax.default, (layout,)
        yield operators.heatmap_argmax_mean.default, (layout, maps[:, :, 0, 0].abs())
        yield operators.soft_argmax.default, (layout.detach().requires_grad_(), 4.0)
        yield operators.soft_argmax_forward.default, (layout.detach().requires_grad_(), 4.0)
        coords, stats = operators.soft_argmax_forward(layout, 4.0)
        yield operators.soft_argmax_backward.default, (torch.ones_like(coords), layout, coords, stats, 4.0)
    yield operators.triplet_angle_distance.default, (source, target, triplets)
    yield operators.triplet_angle_distance.default, (source, target, triplets, valid, None, 2)
    yield operators.triplet_angle_distance.default, (random_poses(2, 1, 4).to(device), random_poses(3, 5).to(device),
                                                     triplets)
    yield operators.similar_pairs.default, (source, target, triplets, 0.2, valid)
    yield operators.similar_pairs.default, (source, target, triplets, 0.2, valid, None, 1, 7)


def test_opcheck(backend):
    for operator, arguments in operator_calls(backend):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend, compiler):
    def decode(maps, source, target, triplets, valid):
        coords, confidence, mean = kernels.heatmap_argmax_mean(maps)
        return (coords, confidence, kernels.soft_argmax(maps, 4.0), mean, *kernels.heatmap_argmax(maps),
                kernels.triplet_angle_distance(source, target, triplets, valid, min_triplets=2),
                *([kernels.similar_pairs(source, target, triplets, 0.2, valid, capacity=9)] if backend == "cuda"
                  or common.INTERPRET else []))

    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, backend=compiler)
    for batch in (2, 3):
        maps = random_maps((batch, 3, 7, 5)).to(backend).requires_grad_()
        arguments = (maps, random_poses(batch).to(backend), random_poses(3, seed=1).to(backend),
                     TRIPLETS.to(backend), torch.ones(batch, 8, dtype=torch.bool, device=backend))
        expected, found = decode(*arguments), compiled(*arguments)
        assert len(expected) == len(found)
        for ours, eager in zip(found, expected):
            assert torch.equal(ours, eager)
        gradients = [torch.autograd.grad(result[2].square().sum(), maps)[0] for result in (expected, found)]
        assert torch.equal(*gradients)


def test_pairs_compile_with_their_number_unknown(backend):
    """How many pairs there are is a size that the graph learns when it runs."""
    torch._dynamo.reset()
    source, target, triplets = (tensor.to(backend) for tensor in (random_poses(9), random_poses(7, seed=1), TRIPLETS))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        mined = torch.compile(lambda gamma: kernels.similar_pairs(source, target, triplets, gamma).sum(dim=0),
                              backend="eager", fullgraph=True)
        for gamma in (0.3, 0.1, 0.0):
            assert torch.equal(mined(gamma), kernels.similar_pairs(source, target, triplets, gamma).sum(dim=0))


def test_vmap_is_a_loop(backend):
    """torch.func.vmap over any dimension of any tensor equals the calls one by one."""
    maps = random_maps((2, 3, 4, 6, 5)).to(backend)           # mapped: dimension 0, or 2
    weight = random_maps((3, 4)).abs().to(backend)
    for dim in (0, 2):
        parts = maps.unbind(dim)
        for found, expected in zip(torch.func.vmap(kernels.heatmap_argmax, in_dims=dim)(maps),
                                   zip(*map(kernels.heatmap_argmax, parts))):
            assert torch.equal(found, torch.stack(expected))
        found = torch.func.vmap(lambda h: torch.ops.actupose.soft_argmax(h, 4.0), in_dims=dim)(maps)
        expected = torch.stack([torch.ops.actupose.soft_argmax(part, 4.0) for part in parts])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for found, expected in zip(torch.func.vmap(kernels.heatmap_argmax_mean, in_dims=(0, None))(maps, weight),
                               zip(*(kernels.heatmap_argmax_mean(part, weight) for part in maps))):
        assert torch.equal(found, torch.stack(expected))

    distance, triplets = kernels.triplet_angle_distance, TRIPLETS.to(backend)
    source, target = random_poses(3, 2, 4).to(backend), random_poses(2, 5, seed=1).to(backend)
    valid, every = random_mask(4, 3, 8).to(backend), random_mask(5, 8, seed=1).to(backend)
    found = torch.func.vmap(distance, in_dims=(0, None, None))(source, target, triplets)
    expected = torch.stack([distance(part, target, triplets) for part in source])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)   # sums over other strides round otherwise
    call = torch.func.vmap(lambda s, t, v: distance(s, t, triplets, v, every), in_dims=(1, 0, 1))
    found = call(source[:, :, :].movedim(0, 2)[0], target.expand(3, 2, 5, 8, 2)[:, 0], valid)
    expected = [distance(source[i, 0], target[0], triplets, valid[:, i], every) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-6)
    found = torch.func.vmap(lambda v: distance(source[0, 0], target, triplets, v), in_dims=1)(valid)
    expected = torch.stack([distance(source[0, 0], target, triplets, part) for part in valid.unbind(1)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="triplets"):
        torch.func.vmap(lambda t: distance(source, target, t))(triplets.expand(2, 5, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    """Half-precision heatmaps of a network under autocast are decoded in float32, gradients come back in half."""
    maps = random_maps((2, 3, 9, 8)).to(backend, dtype).requires_grad_()
    poses, triplets = random_poses(6).to(backend), TRIPLETS.to(backend)

    def results():
        coords = kernels.soft_argmax(maps, 20.0)
        return (coords, *torch.autograd.grad(coords.square().sum(), maps), *kernels.heatmap_argmax_mean(maps),
                kernels.triplet_angle_distance(poses, poses.to(dtype), triplets))

    plain = results()
    with torch.autocast(torch.device(backend).type, dtype=dtype):
        under = results()
    assert [tensor.dtype for tensor in under] == [torch.float32, dtype] + [torch.float32] * 4
    for ours, expected in zip(under, plain):
        assert torch.equal(ours, expected)


def test_vmap_over_nothing(backend):
    coords, confidence = torch.func.vmap(kernels.heatmap_argmax)(torch.zeros(0, 3, 2, 4, 4, device=backend))
    assert coords.shape == (0, 3, 2, 2) and confidence.shape == (0, 3, 2)


def test_no_second_derivative_by_mistake(backend):
    """The operator is differentiable once; asking for more is an error, not a zero."""
    maps = random_maps((1, 2, 4, 4)).to(backend).requires_grad_()
    coords = torch.ops.actupose.soft_argmax(maps, 4.0)
    gradient, = torch.autograd.grad(coords.square().sum(), maps, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_operator_has_the_gradient_of_the_reference(backend):
    """torch.ops.actupose.soft_argmax, which CPU tensors reach by this name alone, against gradcheck."""
    maps = random_maps((2, 2, 3, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: torch.ops.actupose.soft_argmax(h, 1.5), (maps,))
    ours = random_maps((2, 2, 3, 4)).to(backend).requires_grad_()
    found, = torch.autograd.grad(torch.ops.actupose.soft_argmax(ours, 1.5).square().sum(), ours)
    exact = ours.detach().double().requires_grad_()
    expected, = torch.autograd.grad(reference.soft_argmax(exact, 1.5).square().sum(), exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_offsets_beyond_2_31_elements(backend):
    """Strides of 2^30 elements, which an int32 holds, and twice that, which it does not: samples, rows, poses.
    The 4 GB between them are never touched, and so take no memory."""
    room = torch.empty(2 ** 31 + 4096, dtype=torch.float16, device=backend)
    content = random_maps((3, 1, 8, 8)).half().to(backend)
    for shape, strides in (((3, 1, 8, 8), (2 ** 30, 64, 8, 1)), ((1, 1, 3, 8), (0, 0, 2 ** 30, 1)),
                           ((1, 3, 8, 8), (0, 2 ** 30, 8, 1))):
        maps = room.as_strided(shape, strides)
        plain = content.flatten()[:maps.numel()].view(shape)
        maps.copy_(plain)
        weight = torch.ones(shape[:2], device=backend)
        for found, expected in zip(kernels.heatmap_argmax_mean(maps, weight), reference.heatmap_argmax_mean(plain, weight)):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        maps, plain = maps.detach().requires_grad_(), plain.detach().requires_grad_()
        found, expected = kernels.soft_argmax(maps, 5.0), reference.soft_argmax(plain, 5.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        gradients = [torch.autograd.grad(coords.square().sum(), given)[0]
                     for coords, given in ((found, maps), (expected, plain))]
        torch.testing.assert_close(*gradients, rtol=2e-3, atol=1e-4)
    poses = room.as_strided((3, 8, 2), (2 ** 30, 2, 1))
    poses.copy_(random_poses(3))
    plain, triplets = poses.clone(memory_format=torch.contiguous_format), TRIPLETS.to(backend)
    expected = reference.triplet_angle_distance(plain, plain, triplets)
    torch.testing.assert_close(kernels.triplet_angle_distance(poses, poses, triplets), expected, rtol=0, atol=1e-6)
    assert torch.equal(kernels.similar_pairs(poses, poses, triplets, 0.01), torch.arange(3, device=backend)[:, None].expand(3, 2))


# --- where they run -----------------------------------------------------------------------------------------

def test_environment_chooses_the_interpreter(run_python):
    """DESIGN §8: with TRITON_INTERPRET=1 CPU tensors go through the kernels, without it through the
    reference."""
    if not common.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    code = ("import torch, kernels; from kernels import common, reference; reference.heatmap_argmax = None\n"
            "try: print(kernels.heatmap_argmax(torch.eye(3).view(1, 1, 3, 3))[1].item())\n"
            "except TypeError: print('reference')")
    assert run_python(code, TRITON_INTERPRET="1").strip() == "1.0"
    assert run_python(code).strip() == "reference"


def test_works_without_triton(run_python):
    code = ("import sys; sys.modules['triton'] = None\n"
            "import torch, kernels; print(kernels.heatmap_argmax(torch.eye(3).view(1, 1, 3, 3))[1].item())")
    assert run_python(code).strip() == "1.0"


COMPILE = """
import subprocess
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import common
from kernels.heatmap_argmax import argmax_kernel, finish_kernel
from kernels.soft_argmax import backward_kernel, forward_kernel, forward_options, join_kernel
from kernels.triplet_angle import LARGE, MINING, SMALL, distance_kernel, pairs_kernel

TYPES = {name: "*fp32" for name in ("coords", "grad_coords", "stats", "confidence", "mean", "weight",
                                    "source", "target", "distance")}
TYPES.update({name: "*i64" for name in ("triplets", "counts", "starts", "pairs", "limit")})
TYPES.update(candidates="*i32", partial="*fp64", source_valid="*u8", target_valid="*u8", beta="fp32", gamma="fp32")

def report(title, kernel, constants, num_warps=None, options=None, **pointers):
    options = options or {"num_warps": num_warps, **common.COMPILE_OPTIONS}
    # As a launch at the paper's sizes does: aligned pointers, and sizes and strides that 16 divides.
    types = {name: {**TYPES, **pointers}.get(name, "i32") for name in kernel.arg_names}
    types.update({name: "constexpr" for name in constants})
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if types[name][0] == "*" or types[name] == "i32" and name not in ("shares", "A", "min_triplets")}
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32),
                              options=options)
    with open(sys.argv[2], "wb") as file:
        file.write(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", sys.argv[2]], check=True, capture_output=True, text=True)
    used = dict(word.split(":")[:2] for word in usage.stdout.split() if word.startswith(("REG:", "STACK:", "LOCAL:")))
    # 16-byte accesses, of which each thread has several in flight
    wide = sum(compiled.asm["ptx"].count(access) for access in ("ld.global.v4.b32", "st.global.v4.b32"))
    print(title, options["num_warps"], used["REG"], compiled.metadata.shared, used["STACK"], used["LOCAL"], wide, sep="|")

for element, tile, unit in (("fp32", (1, 4096), "w"), ("fp32", (8, 256), "k"), ("fp32", (4, 256), "w"),
                            ("fp16", (1, 4096), "w"), ("bf16", (1, 4096), "w"), ("bf16", (16, 128), "k")):
    maps = dict(heatmaps="*" + element, grad_heatmaps="*" + element)
    layout = {"FLAT": True, "BLOCK_K": tile[0], "BLOCK_N": tile[1], "stride_" + unit: 1}
    warps = common.warps_for(tile[0] * tile[1])
    of = f"{element} {tile[0]}x{tile[1]} {'channels-last' if unit == 'k' else 'contiguous'}"
    for shared in (False, True):
        title = " shared" if shared else ""
        report(f"argmax {of}{title}", argmax_kernel, {"SHARED": shared, **layout}, warps, **maps)
        report(f"soft-argmax forward {of}{title}", forward_kernel, {"SHARED": shared, "WIDTH": 64, **layout},
               options=forward_options(*tile), **maps)
    report(f"soft-argmax backward {of}", backward_kernel,
           {"WIDTH": 64, "GRAD_FLAT": True, "grad_" + unit: 1, **layout}, warps, **maps)
report("argmax finish", finish_kernel, {"FLAT": True, "SHARED": True, "MEAN": True, "WEIGHTED": True, "stride_w": 1,
                                        "BLOCK_K": 16, "BLOCK_S": 32}, 4, heatmaps="*fp32")
report("soft-argmax join", join_kernel, {"BLOCK_K": 16, "BLOCK_S": 32}, 4)
for masked in (False, True):
    constants = {"SOURCE_MASKED": masked, "TARGET_MASKED": masked, "source_c": 1, "target_c": 1}
    for name, kernel, tile in (("distance large tile", distance_kernel, LARGE),
                               ("distance small tile", distance_kernel, SMALL), ("pairs", pairs_kernel, MINING)):
        tile = dict(tile)
        warps = tile.pop("num_warps")
        report(f"{name}{' with masks' if masked else ''}", kernel, {**constants, **tile}, warps)
"""


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_kernels_compile_without_a_gpu(capability, tmp_path, run_python):
    """DESIGN §8: a cubin for each kernel and tile, and by its own account no stack, that is, no spilled register.
    `pytest -s` prints the table."""
    if not common.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    assembler = "ptxas_blackwell" if capability == "100" else "ptxas"
    for tool in (assembler, "cuobjdump"):
        try:
            getattr(common.triton.knobs.nvidia, tool).path
        except (AttributeError, RuntimeError) as error:
            pytest.skip(f"this Triton has no {tool}: {error}")
    output = run_python(COMPILE, capability, str(tmp_path / "kernel.cubin"), TRITON_CACHE_DIR=str(tmp_path))
    rows = [line.split("|") for line in output.splitlines()]
    print(f"\nsm_{capability:42s} {'warps':>5} {'registers':>9} {'shared':>7} {'spilled':>7} {'16-byte accesses':>17}")
    for title, warps, registers, shared, stack, local, wide in rows:
        print(f"{title:45s} {warps:>5} {registers:>9} {shared:>7} {int(stack) + int(local):>7} {wide:>17}")
    assert len(rows) == 38
    for title, warps, registers, shared, stack, local, wide in rows:
        assert stack == local == "0", title
        if "contiguous" in title:
            assert int(wide) >= 1, title


# --- on a GPU -----------------------------------------------------------------------------------------------

@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_offsets_beyond_2_31_on_gpu():
    """The last of the maps lies beyond 2^31 elements, and so does the gradient there."""
    maps = torch.zeros(2**31 // 2**20 + 2, 1, 1024, 1024, dtype=torch.float16, device="cuda")
    maps[-1, 0, 700, 900] = 1.0
    coords, confidence = kernels.heatmap_argmax(maps)
    assert coords[-1, 0].tolist() == [900.0, 700.0] and confidence[-1, 0].item() == 1.0
    torch.testing.assert_close(kernels.soft_argmax(maps, 1000.0)[-1, 0].cpu(), torch.tensor([900.0, 700.0]))


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_cuda_graph_on_gpu():
    maps = torch.rand(4, 16, 64, 64, device="cuda")
    poses, triplets = random_poses(8).cuda(), TRIPLETS.cuda()

    def decode():
        return (*kernels.heatmap_argmax(maps), kernels.soft_argmax(maps, 5.0),
                kernels.triplet_angle_distance(poses, poses, triplets), *kernels.heatmap_argmax_mean(maps),
                kernels.similar_pairs(poses, poses, triplets, 0.1, capacity=64))

    decode()   # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode()
    maps.copy_(torch.rand(4, 16, 64, 64))
    graph.replay()
    for ours, expected in zip(found, decode()):
        assert torch.equal(ours, expected)
