"""What one step of training consists of: `python -m docs.step [options of train.py]`.

Times the parts of `Trainer.step` where they are called, over some steps before and after the teacher has
joined, and prints a table in Markdown. A GPU is waited for after each part.
"""
import dataclasses
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import actupose
import data
import train
from docs.reproduce import markdown

# Where the time of a step goes: what to wrap, and the row of the table.
PARTS = [
    (train.Trainer, "augment", "warp and colour jitter of the views"),
    (train.Trainer, "restyle", "style transfer"),
    (train.Trainer, "forward", "forward passes"),
    (train.Trainer, "descend", "backward pass and Adam"),
    (train, "draw_step", "random views and numbers"),
    (train, "render_heatmaps", "target heatmaps"),
    (train.kernels, "heatmap_argmax_mean", "argmax and confidence"),
    (train.kernels, "rectify", "pseudo-labels"),
    (train.kernels, "soft_argmax", "soft-argmax (Eq. 5), forward"),
    (train.kernels, "triplet_angle_distance", "angles of poses (Eq. 7)"),
    (actupose, "occlude_keypoints", "occlusion"),
    (actupose, "update_teacher", "moving average"),
]


class Clock:
    """Adds up the seconds of the wrapped functions, by row."""

    def __init__(self, device):
        self.device = device
        self.seconds = {}

    def now(self):
        """The time when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, owner, name, row):
        """Replace a function by one that is timed."""
        function = getattr(owner, name)
        self.seconds[row] = 0.0

        def timed(*arguments, **options):
            begun = self.now()
            result = function(*arguments, **options)
            self.seconds[row] += self.now() - begun
            return result

        setattr(owner, name, timed)

    def measure(self, step, count):
        """Milliseconds per step: {row: milliseconds}, "whole step" the last of them."""
        for i in range(5):                                      # warms up
            step(i)
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        begun = self.now()
        for i in range(count):
            step(i)
        whole = self.now() - begun
        rows = dict(self.seconds)
        rows["losses and the rest"] = whole - sum(self.seconds.values())
        rows["whole step"] = whole
        return {row: 1000 * seconds / count for row, seconds in rows.items()}


def operations(settings):
    """Operations of the networks in all steps of a run, half of the batches restyled. A multiply-add is two.

    Not counted: training the style networks and the Pose-VAE, evaluation.
    """
    few = dataclasses.replace(settings, batch_size=2, style_prob=1.0)
    trainer = train.make_trainer(few, data.BODY16, torch.device("cpu"))
    images = torch.zeros(2, 3, few.image_size, few.image_size, dtype=torch.uint8)
    keypoints = torch.rand(2, len(data.BODY16), 2) * few.image_size
    batch = (images, keypoints, torch.ones(2, len(data.BODY16)))
    styles = [None]
    if few.style != "off":
        styles.append(actupose.StyleTransfer(few.style))
    total = 0
    phases = {"pretraining": few.pretrain_epochs, "adaptation": few.epochs - few.pretrain_epochs}
    for phase, epochs in phases.items():
        if phase == "adaptation":
            trainer.begin_adaptation()
        for style in styles:
            trainer.style_transfer = style
            with FlopCounterMode(display=False) as counter:
                trainer.step(0, batch, images)
            per_image = counter.get_total_flops() / 2
            steps = epochs * settings.iters_per_epoch / len(styles)
            total += steps * settings.batch_size * per_image
    return total


def command(arguments):
    """Print the table. Returns the exit status."""
    parser = train.Parser(prog="python -m docs.step", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed [40]")
    parser.add_argument("--preset", choices=tuple(train.PRESETS), default="demo",
                        help="of the settings [demo]")
    parser.add_argument("--operations", action="store_true",
                        help="of the steps of a whole run, in place of the table")
    # The table is of the built-in bodies.
    parser.add_settings(skip=("source", "source_root", "target", "target_root"))
    options = vars(parser.parse_args(arguments))
    if options["steps"] < 1:
        raise train.UserError(f"--steps: must be at least 1, got {options['steps']}")
    device = train.choose_device(options.pop("device"))
    count = options.pop("steps")
    count_operations = options.pop("operations")
    settings = train.resolve_amp(train.make_settings(options.pop("preset"), **options), device)
    if count_operations:
        total = operations(settings)
        print(f"{total:.2g} operations: {total / 1e14 / 3600:.1f} hours at 100 TFLOP/s, "
              f"{total / 1.5e13 / 3600:.1f} at 15")
        return 0
    trainer = train.make_trainer(settings, data.BODY16, device)
    if settings.style != "off":
        transfer = actupose.StyleTransfer(settings.style).to(device)
        trainer.style_transfer = transfer.requires_grad_(False).eval()
    source = data.Mannequin("source", "train", settings.image_size, settings.batch_size)
    target = data.Mannequin("target", "train", settings.image_size, settings.batch_size)
    everything = torch.arange(settings.batch_size)
    source_batch = source[everything]
    target_images, _, _ = target[everything]

    def step(i):
        trainer.step(i, source_batch, target_images if trainer.uses_target else None)

    clock = Clock(device)
    for part in PARTS:
        clock.wrap(*part)
    columns = {"pretraining": clock.measure(step, count)}
    trainer.begin_adaptation()
    columns["adaptation"] = clock.measure(step, count)

    processor = train.kernels.common.device_name(device)
    print(f"{processor}, {torch.get_num_threads()} threads, --amp {settings.amp}, torch {torch.__version__}; "
          "milliseconds per step (per cent)\n")
    table = [["part", *columns]]
    for row in columns["adaptation"]:
        cells = [row]
        for times in columns.values():
            cells.append(f"{times[row]:.1f} ({100 * times[row] / times['whole step']:.0f} %)")
        table.append(cells)
    print(markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(train.guarded(command, sys.argv[1:], "docs.step", ""))
