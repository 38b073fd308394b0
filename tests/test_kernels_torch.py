"""The fused operators as part of torch: registration, compilation, vmap, autocast, 64-bit offsets."""
import pytest
import torch

import kernels
from kernels import common, reference
from test_kernels import CUDA, TRIPLETS, random_maps, random_mask, random_poses

triton_only = pytest.mark.skipif(not common.HAVE_TRITON, reason="Triton is not installed")


# --- torch.library ------------------------------------------------------------------------------------------

def test_opcheck(backend):
    """Schemas, fake implementations and autograd rules of all operators pass torch's own checks."""
    operators = torch.ops.actupose
    maps = random_maps((2, 3, 7, 5)).to(backend)
    weight = maps[:, :, 0, 0].abs()
    calls = []
    channels_last = maps.half().contiguous(memory_format=torch.channels_last)
    for layout in (maps, channels_last, maps[:, :1].expand_as(maps)):
        coords, stats = operators.soft_argmax_forward(layout, 4.0)
        trained = layout.detach().requires_grad_()
        calls += [(operators.heatmap_argmax, layout), (operators.heatmap_argmax_mean, layout, weight),
                  (operators.soft_argmax, trained, 4.0), (operators.soft_argmax_forward, trained, 4.0),
                  (operators.soft_argmax_backward, torch.ones_like(coords), layout, coords, stats, 4.0)]
    source, target, triplets = (t.to(backend) for t in (random_poses(4), random_poses(3, seed=1), TRIPLETS))
    valid = random_mask(4, 8).to(backend)
    batches = random_poses(2, 1, 4).to(backend), random_poses(3, 5).to(backend)
    calls += [(operators.triplet_angle_distance, source, target, triplets),
              (operators.triplet_angle_distance, source, target, triplets, valid, None, 2),
              (operators.triplet_angle_distance, *batches, triplets),
              (operators.similar_pairs, source, target, triplets, 0.2, valid),
              (operators.similar_pairs, source, target, triplets, 0.2, valid, None, 1, 7)]
    for operator, *arguments in calls:
        torch.library.opcheck(operator.default, tuple(arguments))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend, compiler):
    """torch.compile(fullgraph=True) gives the same results and gradients, also for another batch size."""
    def decode(maps, source, target, triplets, valid):
        pairs = []
        if backend == "cuda" or common.INTERPRET:   # the reference's pairs are a loop over data
            pairs = [kernels.similar_pairs(source, target, triplets, 0.2, valid, capacity=9)]
        distance = kernels.triplet_angle_distance(source, target, triplets, valid, min_triplets=2)
        return (kernels.soft_argmax(maps, 4.0), *kernels.heatmap_argmax(maps),
                *kernels.heatmap_argmax_mean(maps), distance, *pairs)

    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, backend=compiler)
    for batch in (2, 3):
        maps = random_maps((batch, 3, 7, 5)).to(backend).requires_grad_()
        arguments = (maps, random_poses(batch).to(backend), random_poses(3, seed=1).to(backend),
                     TRIPLETS.to(backend), torch.ones(batch, 8, dtype=torch.bool, device=backend))
        expected, found = decode(*arguments), compiled(*arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        gradients = [torch.autograd.grad(result[0].square().sum(), maps)[0] for result in (expected, found)]
        assert torch.equal(*gradients)


def test_pairs_compile_with_their_number_unknown(backend):
    """How many pairs there are is a size that the graph learns when it runs."""
    torch._dynamo.reset()
    poses = [tensor.to(backend) for tensor in (random_poses(9), random_poses(7, seed=1), TRIPLETS)]

    def mined(gamma):
        return kernels.similar_pairs(*poses, gamma).sum(dim=0)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(mined, backend="eager", fullgraph=True)
        for gamma in (0.3, 0.1, 0.0):
            assert torch.equal(compiled(gamma), mined(gamma))


def check_vmap(function, in_dims, *tensors, atol=1e-6):
    """torch.func.vmap equals the calls one by one. atol: sums over other strides round differently."""
    size = next(tensor.shape[dim] for tensor, dim in zip(tensors, in_dims) if dim is not None)
    parts = [[tensor] * size if dim is None else tensor.unbind(dim) for tensor, dim in zip(tensors, in_dims)]
    expected = [function(*arguments) for arguments in zip(*parts)]
    found = torch.func.vmap(function, in_dims)(*tensors)
    if isinstance(found, torch.Tensor):
        found, expected = (found,), [(result,) for result in expected]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*expected))), rtol=0, atol=atol)


def test_vmap_is_a_loop(backend):
    """vmap works over any dimension of any tensor, also over an empty one, but not over triplets."""
    maps, weight = random_maps((2, 3, 4, 6, 5)).to(backend), random_maps((3, 4)).abs().to(backend)
    for dim in (0, 2):
        check_vmap(kernels.heatmap_argmax, (dim,), maps, atol=0)
        check_vmap(lambda given: torch.ops.actupose.soft_argmax(given, 4.0), (dim,), maps)
    check_vmap(kernels.heatmap_argmax_mean, (0, None), maps, weight, atol=0)
    coords, confidence = torch.func.vmap(kernels.heatmap_argmax)(maps[:0])
    assert coords.shape == (0, 3, 4, 2) and confidence.shape == (0, 3, 4)

    distance, triplets = kernels.triplet_angle_distance, TRIPLETS.to(backend)
    source, target = random_poses(3, 2, 4).to(backend), random_poses(2, 5, seed=1).to(backend)
    valid, every = random_mask(4, 3, 8).to(backend), random_mask(5, 8, seed=1).to(backend)
    check_vmap(distance, (0, None, None), source, target, triplets)
    check_vmap(lambda s, t, v: distance(s, t, triplets, v, every), (1, 0, 1),
               source[:, 0].transpose(0, 1), target[:1].expand(3, 5, 8, 2), valid)
    check_vmap(lambda v: distance(source[0, 0], target, triplets, v), (1,), valid)
    with pytest.raises(ValueError, match="triplets must be the same"):
        torch.func.vmap(lambda t: distance(source, target, t))(triplets.expand(2, 5, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    """Half-precision heatmaps under autocast are decoded in float32; their gradients come back in half."""
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
    torch.testing.assert_close(under, plain, rtol=0, atol=0)


def test_no_second_derivative_by_mistake(backend):
    """The operator is differentiable once; asking for more is an error, not a zero."""
    maps = random_maps((1, 2, 4, 4)).to(backend).requires_grad_()
    coords = torch.ops.actupose.soft_argmax(maps, 4.0)
    gradient, = torch.autograd.grad(coords.square().sum(), maps, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


# --- where they run -----------------------------------------------------------------------------------------

def test_offsets_beyond_2_31_elements(backend):
    """Samples, rows, keypoints and poses may lie 2^31 elements apart, which an int32 does not hold, and 2^30,
    which it does. The 4 GB between them are never touched, and so take no memory."""
    room = torch.empty(2 ** 31 + 4096, dtype=torch.float16, device=backend)
    content = random_maps((3, 1, 8, 8)).half().to(backend)
    for shape, strides in (((3, 1, 8, 8), (2 ** 30, 64, 8, 1)), ((1, 1, 3, 8), (0, 0, 2 ** 30, 1)),
                           ((1, 3, 8, 8), (0, 2 ** 30, 8, 1))):
        plain = content.flatten()[:shape[0] * shape[1] * shape[2] * shape[3]].view(shape)
        maps = room.as_strided(shape, strides).copy_(plain)
        weight = torch.ones(shape[:2], device=backend)
        torch.testing.assert_close(kernels.heatmap_argmax_mean(maps, weight),
                                   reference.heatmap_argmax_mean(plain, weight), rtol=0, atol=1e-6)
        maps, plain = maps.detach().requires_grad_(), plain.detach().requires_grad_()
        found, expected = kernels.soft_argmax(maps, 5.0), reference.soft_argmax(plain, 5.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(*torch.autograd.grad(found.square().sum(), maps),
                                   *torch.autograd.grad(expected.square().sum(), plain), rtol=2e-3, atol=1e-4)
    poses = room.as_strided((3, 8, 2), (2 ** 30, 2, 1)).copy_(random_poses(3))
    plain, triplets = poses.clone(memory_format=torch.contiguous_format), TRIPLETS.to(backend)
    torch.testing.assert_close(kernels.triplet_angle_distance(poses, poses, triplets),
                               reference.triplet_angle_distance(plain, plain, triplets), rtol=0, atol=1e-6)
    assert kernels.similar_pairs(poses, poses, triplets, 0.01).tolist() == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_contiguous_maps_beyond_2_31_on_gpu():
    maps = torch.zeros(2**31 // 2**20 + 2, 1, 1024, 1024, dtype=torch.float16, device="cuda")
    maps[-1, 0, 700, 900] = 1.0
    coords, confidence = kernels.heatmap_argmax(maps)
    assert coords[-1, 0].tolist() == [900.0, 700.0] and confidence[-1, 0].item() == 1.0
    torch.testing.assert_close(kernels.soft_argmax(maps, 1000.0)[-1, 0].cpu(), torch.tensor([900.0, 700.0]))


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_cuda_graph_on_gpu():
    """A replay of the graph decodes the new content of its inputs."""
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
    torch.testing.assert_close(found, decode(), rtol=0, atol=0)


@pytest.mark.parametrize("prepare, environment, printed", [
    pytest.param("", {"TRITON_INTERPRET": "1"}, "1.0", marks=triton_only, id="interpreter"),
    pytest.param("", {}, "reference 1.0", id="CPU"),
    pytest.param("import sys; sys.modules['triton'] = None", {}, "reference 1.0", id="no Triton")])
def test_what_runs_on_the_cpu(prepare, environment, printed, run_python):
    """DESIGN §8: CPU tensors go through the kernels under TRITON_INTERPRET=1, otherwise, and without Triton,
    through the reference."""
    code = ("import torch, kernels; from kernels import reference; decode = reference.heatmap_argmax\n"
            "reference.heatmap_argmax = lambda maps: print('reference', end=' ') or decode(maps)\n"
            "print(kernels.heatmap_argmax(torch.eye(3).view(1, 1, 3, 3))[1].item())")
    assert run_python(f"{prepare}\n{code}", **environment).strip() == printed


COMPILE = """
import re, subprocess, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import common
from kernels.heatmap_argmax import argmax_kernel, finish_kernel
from kernels.soft_argmax import backward_kernel, forward_kernel, forward_options, join_kernel
from kernels.triplet_angle import LARGE, MINING, ROWS, SMALL, distance_kernel, pairs_kernel, table_kernel

TYPES = dict.fromkeys(("coords", "grad_coords", "stats", "confidence", "mean", "weight", "source", "target",
                       "table", "distance"), "*fp32")
TYPES |= dict.fromkeys(("triplets", "counts", "ends", "pairs"), "*i64")
TYPES |= dict(candidates="*i32", partial="*fp64", source_valid="*i1", target_valid="*i1", beta="fp32",
              gamma="fp32", scale="fp32", room="i64")

def loops(cubin):
    # (instructions, barriers) of each loop: from the target of a branch backwards up to that branch.
    listing = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-sass", cubin], text=True)
    code = re.findall(r"/[*]([0-9a-f]{4,})[*]/ +([^;]+);", listing)   # (address, instruction)
    place, found = {int(address, 16): n for n, (address, _) in enumerate(code)}, []
    for last, (address, instruction) in enumerate(code):
        target = re.search(r"BRA.* (0x[0-9a-f]+)", instruction)
        if target and int(target[1], 16) < int(address, 16):   # those that lead to themselves are padding
            body = code[place[int(target[1], 16)]:last + 1]
            found.append((len(body), sum("BAR." in instruction for _, instruction in body)))
    return found

def report(title, kernel, constants, num_warps=None, options=None, maps="*fp32"):
    options = options or {"num_warps": num_warps, **common.COMPILE_OPTIONS}
    # As a launch at the paper's sizes does: aligned pointers, and sizes and strides that 16 divides.
    pointers = {**TYPES, "heatmaps": maps, "grad_heatmaps": maps}
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    types.update(dict.fromkeys(constants, "constexpr"))
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(types.items())
               if kind[0] == "*" or kind == "i32" and name not in ("shares", "A", "min_triplets")}
    compiled = triton.compile(ASTSource(kernel, types, constexprs=constants, attrs=aligned),
                              target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    with open(sys.argv[2], "wb") as file:
        file.write(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.check_output([tool, "--dump-resource-usage", sys.argv[2]], text=True)
    used = dict(word.split(":")[:2] for word in usage.split() if ":" in word)
    spilled = int(used["STACK"]) + int(used["LOCAL"])
    # 16-byte accesses, of which each thread has several in flight
    wide = sum(compiled.asm["ptx"].count(access) for access in ("ld.global.v4.b32", "st.global.v4.b32"))
    print(title, options["num_warps"], used["REG"], compiled.metadata.shared, spilled, wide,
          " ".join(f"{length}/{barriers}" for length, barriers in loops(sys.argv[2])), sep="|")

for element, tile, unit in (("fp32", (1, 4096), "w"), ("fp32", (8, 256), "k"), ("fp32", (4, 256), "w"),
                            ("fp16", (1, 4096), "w"), ("bf16", (16, 128), "k")):
    maps = "*" + element
    layout = {"FLAT": True, "BLOCK_K": tile[0], "BLOCK_N": tile[1], "stride_" + unit: 1}
    warps = common.warps_for(tile[0] * tile[1])
    of = f"{element} {tile[0]}x{tile[1]} {'channels-last' if unit == 'k' else 'contiguous'}"
    for shared in (False,) if tile == (4, 256) else (False, True):   # small maps are never shared
        title = of + " shared" * shared
        report(f"argmax {title}", argmax_kernel, {"SHARED": shared, **layout}, warps, maps=maps)
        report(f"soft-argmax forward {title}", forward_kernel, {"SHARED": shared, "WIDTH": 64, **layout},
               options=forward_options(*tile), maps=maps)
    report(f"soft-argmax backward {of}", backward_kernel,
           {"WIDTH": 64, "GRAD_FLAT": True, "grad_" + unit: 1, **layout}, warps, maps=maps)
report("argmax finish", finish_kernel, {"FLAT": True, "SHARED": True, "MEAN": True, "WEIGHTED": True,
                                        "stride_w": 1, "BLOCK_K": 16, "BLOCK_S": 32}, 4)
report("soft-argmax join", join_kernel, {"BLOCK_K": 16, "BLOCK_S": 32}, 4)
for masked in (False, True):
    constants = {"SOURCE_MASKED": masked, "TARGET_MASKED": masked, "source_c": 1, "target_c": 1}
    report("angles" + " with masks" * masked, table_kernel, {**constants, "BLOCK": ROWS, "COLUMNS": 2}, 4)
for name, kernel, tile in (("distance large tile", distance_kernel, LARGE),
                           ("distance small tile", distance_kernel, SMALL), ("pairs", pairs_kernel, MINING)):
    report(name, kernel, dict(BLOCK=tile[0], COLUMNS=tile[1]), options={**tile[2], **common.COMPILE_OPTIONS})
"""


@triton_only
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_kernels_compile_without_a_gpu(capability, tmp_path, run_python):
    """DESIGN §8: each kernel and tile becomes a cubin that, by its own account, has no stack: it spills no
    register. Contiguous maps are read 16 bytes at a time. `pytest -s` prints the table."""
    for tool in ("ptxas_blackwell" if capability == "100" else "ptxas", "cuobjdump"):
        try:
            getattr(common.triton.knobs.nvidia, tool).path
        except (AttributeError, RuntimeError) as error:
            pytest.skip(f"this Triton has no {tool}: {error}")
    output = run_python(COMPILE, capability, str(tmp_path / "kernel.cubin"), TRITON_CACHE_DIR=str(tmp_path))
    rows = [line.split("|") for line in output.splitlines()]
    for row in [("sm_" + capability, "warps", "registers", "shared", "spilled", "16-byte accesses",
                 "loops: instructions/barriers"), *rows]:
        print("{:45} {:>5} {:>9} {:>7} {:>7} {:>17}  {}".format(*row))
    assert len(rows) == 30
    for title, *_, spilled, wide, inside in rows:
        assert spilled == "0" and ("contiguous" not in title or int(wide) >= 1), title
        if title.startswith(("distance", "pairs")):   # first the loop over pairs, then the one that counts
            pair_loop, counting_loop, *_ = inside.split()
            assert pair_loop.endswith("/0") and counting_loop.endswith("/0"), title
            if title == "distance large tile":   # of which each warp takes two triplets at a time
                assert int(pair_loop[:-2]) <= 2 * 140
