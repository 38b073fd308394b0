"""The fused operators as part of torch: registration, compilation, vmap, autocast, 64-bit offsets."""
import importlib
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kernels
from kernels import angles, argmax, common, reference, softargmax
from test_kernels import CUDA, TRIPLETS, random_maps, random_mask, random_poses

triton_only = pytest.mark.skipif(not common.HAVE_TRITON, reason="Triton is not installed")


# --- torch.library ------------------------------------------------------------------------------------------

def test_opcheck(backend):
    """Schemas, fake implementations and autograd rules of all operators pass torch's own checks. That of
    compiled graphs takes seconds, and each operator is given to it once."""
    operators = torch.ops.actupose
    maps = random_maps((2, 3, 7, 5)).to(backend)
    weight = maps[:, :, 0, 0].abs()
    calls = []
    channels_last = maps.half().contiguous(memory_format=torch.channels_last)
    for layout in (maps, channels_last, maps[:, :1].expand_as(maps)):
        coords, stats = operators.soft_argmax_forward(layout, 4.0)
        trained = layout.detach().requires_grad_()
        calls += [(operators.heatmap_argmax, layout), (operators.heatmap_argmax_mean, layout, weight),
                  (operators.rectify, layout, 1.5, True), (operators.soft_argmax, trained, 4.0),
                  (operators.soft_argmax_forward, layout, 4.0),
                  (operators.soft_argmax_backward, layout, torch.ones_like(coords), coords, stats, 4.0)]
    source, target, triplets = (t.to(backend) for t in (random_poses(4), random_poses(3, seed=1), TRIPLETS))
    valid = random_mask(4, 8).to(backend)
    batches = random_poses(2, 1, 4).to(backend), random_poses(3, 5).to(backend)
    calls += [(operators.triplet_angle_distance, source, target, triplets),
              (operators.triplet_angle_distance, source, target, triplets, valid, None, 2),
              (operators.triplet_angle_distance, *batches, triplets)]
    compiled = set()
    for operator, *arguments in calls:
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if operator not in compiled:
            checks.append("test_aot_dispatch_dynamic")
            compiled.add(operator)
        torch.library.opcheck(operator.default, tuple(arguments), test_utils=checks)


def test_compiles_into_one_graph(backend):
    """torch.compile(fullgraph=True) gives the same results and gradients, also for another batch size."""
    def decode(maps, source, target, triplets, valid):
        distance = kernels.triplet_angle_distance(source, target, triplets, valid, min_triplets=2)
        return (kernels.soft_argmax(maps, 4.0), *kernels.heatmap_argmax(maps),
                *kernels.heatmap_argmax_mean(maps), *kernels.rectify(maps, 1.5, True), distance)

    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        maps = random_maps((batch, 3, 7, 5)).to(backend).requires_grad_()
        arguments = (maps, random_poses(batch).to(backend), random_poses(3, seed=1).to(backend),
                     TRIPLETS.to(backend), torch.ones(batch, 8, dtype=torch.bool, device=backend))
        expected = decode(*arguments)
        found = compiled(*arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        gradients = [torch.autograd.grad(result[0].square().sum(), maps)[0] for result in (expected, found)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    """Half-precision heatmaps under autocast are decoded in float32; their gradients come back in half."""
    maps = random_maps((2, 3, 9, 8)).to(backend, dtype).requires_grad_()
    poses = random_poses(6).to(backend)
    triplets = TRIPLETS.to(backend)

    def results():
        coords = kernels.soft_argmax(maps, 20.0)
        return (coords, *torch.autograd.grad(coords.square().sum(), maps), *kernels.heatmap_argmax_mean(maps),
                kernels.triplet_angle_distance(poses, poses.to(dtype), triplets))

    plain = results()
    with torch.autocast(torch.device(backend).type, dtype=dtype):
        under = results()
    assert [tensor.dtype for tensor in under] == [torch.float32, dtype] + [torch.float32] * 4
    torch.testing.assert_close(under, plain, rtol=0, atol=0)


def test_derivatives_are_right_or_refused(backend):
    """torch.func's grad, vjp and a second derivative are the reference's; so is jvp, or it is an error."""
    maps = random_maps((1, 2, 4, 4)).to(backend)
    direction = random_maps((1, 2, 2), seed=1).to(backend)
    plain, operator = (lambda given, module=module: module.soft_argmax(given, 4.0)
                       for module in (reference, torch.ops.actupose))
    expected, = torch.func.vjp(plain, maps)[1](direction)
    pulled, = torch.func.vjp(lambda given: kernels.soft_argmax(given, 4.0), maps)[1](direction)
    gradient = torch.func.grad(lambda given: (kernels.soft_argmax(given, 4.0) * direction).sum())(maps)
    trained = maps.clone().requires_grad_()
    direct, = torch.autograd.grad(operator(trained), trained, direction, create_graph=True)
    for found in (pulled, gradient, direct):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    second, = torch.autograd.grad(direct.square().sum(), trained)
    true, = torch.autograd.grad(
        torch.autograd.grad(plain(trained), trained, direction, create_graph=True)[0].square().sum(), trained)
    torch.testing.assert_close(second, true, rtol=1e-4, atol=1e-5)
    for function in (operator, lambda given: kernels.soft_argmax(given, 4.0)):
        try:
            tangent = torch.func.jvp(function, (maps,), (maps,))[1]
        except RuntimeError:   # the kernels have no forward mode, and say so
            continue
        torch.testing.assert_close(tangent, torch.func.jvp(plain, (maps,), (maps,))[1], rtol=0, atol=1e-5)


# --- launches -----------------------------------------------------------------------------------------------

@triton_only
def test_a_second_call_compiles_nothing(monkeypatch):
    """A compiled kernel is kept per shape, strides, dtype, device and alignment, whatever the contents."""
    started = []
    plans = [argmax.plan, argmax.plan_rectify, softargmax.plan, softargmax.plan_backward, angles.plan]
    monkeypatch.setattr(common, "INTERPRET", True)
    monkeypatch.setattr(common, "start", lambda launch, pointers: started.append(launch) or (lambda *_: None))

    def compiles(maps, poses):
        """For each operator, whether anything is compiled."""
        calls = [lambda: kernels.heatmap_argmax(maps),
                 lambda: kernels.heatmap_argmax_mean(maps, torch.ones(maps.shape[:2])),
                 lambda: kernels.rectify(maps, 1.5),
                 lambda: torch.autograd.grad(kernels.soft_argmax(maps.requires_grad_(), 4.0).sum(), maps),
                 lambda: kernels.triplet_angle_distance(poses, poses, TRIPLETS)]
        found = []
        for call in calls:
            started.clear()
            call()
            found.append(bool(started))
        return found

    for plan in plans:
        plan.cache_clear()
    maps = random_maps((3, 5, 9, 7))
    poses = random_poses(9)
    all_of_them = [True] * 5
    assert compiles(maps, poses) == all_of_them
    assert compiles(maps.detach().half(), poses.half()) == all_of_them
    assert compiles(maps.detach()[1:].clone(), poses[1:].clone()) == all_of_them
    # Not aligned to 16 bytes, unlike its copy. The poses are the first ones.
    assert compiles(maps.detach()[1:], poses) == [True] * 4 + [False]
    assert not any(compiles(maps.detach() + 1, poses + 1))
    for plan in plans:   # the stand-ins must not outlive the test
        plan.cache_clear()


def test_a_missing_compiler_is_named():
    """Triton compiles C when a kernel first runs; without a compiler its message gets a cure."""
    def kernel(*arguments, **options):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
    with pytest.raises(RuntimeError, match="install gcc"):
        common.Launch({(1, 1, 1): kernel}, (1,), (), {})(torch.ones(1))


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
        maps = maps.detach().requires_grad_()
        plain = plain.detach().requires_grad_()
        found = kernels.soft_argmax(maps, 5.0)
        expected = reference.soft_argmax(plain, 5.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(*torch.autograd.grad(found.square().sum(), maps),
                                   *torch.autograd.grad(expected.square().sum(), plain), rtol=2e-3, atol=1e-4)
    poses = room.as_strided((3, 8, 2), (2 ** 30, 2, 1)).copy_(random_poses(3))
    plain = poses.clone(memory_format=torch.contiguous_format)
    triplets = TRIPLETS.to(backend)
    torch.testing.assert_close(kernels.triplet_angle_distance(poses, poses, triplets),
                               reference.triplet_angle_distance(plain, plain, triplets), rtol=0, atol=1e-6)


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
    poses = random_poses(8).cuda()
    triplets = TRIPLETS.cuda()

    def decode():
        return (*kernels.heatmap_argmax(maps), kernels.soft_argmax(maps, 5.0), *kernels.rectify(maps, 1.5),
                kernels.triplet_angle_distance(poses, poses, triplets), *kernels.heatmap_argmax_mean(maps))

    decode()   # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode()
    maps.copy_(torch.rand(4, 16, 64, 64))
    graph.replay()
    torch.testing.assert_close(found, decode(), rtol=0, atol=0)


@pytest.mark.parametrize("prepare, environment, printed", [
    pytest.param("", {"TRITON_INTERPRET": "1"}, "kernel 1.0", marks=triton_only, id="interpreter"),
    pytest.param("", {}, "1.0", id="CPU"),
    pytest.param("import sys; sys.modules['triton'] = None", {}, "1.0", id="no Triton")])
def test_what_runs_on_the_cpu(prepare, environment, printed, run_python):
    """CPU tensors go through the kernels under TRITON_INTERPRET=1, otherwise, and without Triton,
    through the reference."""
    code = ("import torch, kernels; from kernels import common; start = common.start\n"
            "common.start = lambda *arguments: print('kernel', end=' ') or start(*arguments)\n"
            "print(kernels.heatmap_argmax(torch.eye(3).view(1, 1, 3, 3))[1].item())")
    assert run_python(f"{prepare}\n{code}", **environment).strip() == printed


def test_a_second_import_says_what_to_do(monkeypatch):
    """torch defines an operator once in a process."""
    for name in list(sys.modules):
        if name.startswith("kernels"):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(RuntimeError, match="Restart Python"):
        importlib.import_module("kernels")


COMPILE = """
import sys
from kernels import benchmark
plan = benchmark.COMPILED
plan = plan._replace(heatmaps=plan.heatmaps[:2], poses=plan.poses[::3])     # takes seconds each
print(benchmark.print_compiled(int(sys.argv[1]), plan))
"""


@triton_only
def test_kernels_compile_without_a_gpu(tmp_path, run_python):
    """What the operators launch becomes machine code that does not spill registers, and reads contiguous maps
    16 bytes at a time, on three generations of GPUs. `pytest -s` prints the tables."""
    def compiled(capability):
        return run_python(COMPILE, str(capability), TRITON_CACHE_DIR=str(tmp_path))

    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(compiled, (80, 90, 100)))
    for output in outputs:
        print(output)
        if "was not counted" in output:
            pytest.skip(output)
        lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("|")]
        header, _, *rows = lines
        for row in (dict(zip(header, row)) for row in rows):
            assert int(row["spilled"]) <= 8, row   # bytes; the oldest compiler spills two registers once
            assert "contiguous" not in row["of"] or int(row["16-byte accesses"]) >= 1, row
