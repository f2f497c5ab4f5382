"""`make bench-peers`: an epoch of the project, of pythae and of an ordinary Lightning set-up, each against the bare loop.

The same network (784-400-20), data (MNIST, first images), batch (128) and optimiser (Adam 1e-3). Installs pythae in a
virtual environment of its own, benchmarks/.peers, that borrows PyTorch from this one, and runs there. What differs from the
project is the peers' own way: pythae trains on images binarised once, kept in memory as floats, one `__getitem__` each; the
ordinary set-up is torchvision's MNIST, a transform and a DataLoader.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENVIRONMENT = HERE / ".peers"
PYTHAE = "pythae==0.1.2"
BATCH = 128


def make_environment() -> Path:
    """The Python of an environment that has pythae, and everything that this one has."""
    python = ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (ENVIRONMENT / "ready").is_file():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        inside = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        borrowed = f"{sysconfig.get_path('purelib')}\n{HERE.parent}\n"
        (Path(inside) / "borrowed.pth").write_text(borrowed)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PYTHAE], check=True)
        (ENVIRONMENT / "ready").touch()
    return python


def project(options: argparse.Namespace) -> dict[str, Any]:
    import step

    overrides = [
        "data=mnist",
        "model.latent_dim=20",
        f"data.batch_size={BATCH}",
        f"data.limit={options.images}",
        f"threads={options.threads}",
    ]
    return step.compare_steps("mlp", overrides, options.repetitions, "cpu")


def bare_loop(images: Any) -> Any:
    """Takes turns with a bare loop that trains the same network on the same images."""
    from pair import BareLoop, InTurn

    return InTurn(BareLoop("mlp", 20, images, BATCH, True))


def ordinary(options: argparse.Namespace, workers: int) -> dict[str, Any]:
    """What a first Lightning project looks like: defaults everywhere, a loss that is logged each step."""
    import bare
    import pytorch_lightning as pl
    import torch
    import torchvision

    class Ordinary(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = bare.mlp(20)

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            x, _ = batch
            x = torch.bernoulli(x)
            mean, log_var = self.encoder(x).chunk(2, dim=1)
            z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
            logits = self.decoder(z)
            flat = x.flatten(1)
            distortion = (
                torch.nn.functional.binary_cross_entropy_with_logits(logits, flat, reduction="none").sum(1).mean()
            )
            rate = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
            self.log_dict({"distortion": distortion, "rate": rate, "loss": distortion + rate}, prog_bar=True)
            return distortion + rate

        def validation_step(self, batch: Any, number: int) -> None:
            pass

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    root = os.environ.get("VAE_DATA_DIR", "data")
    whole = torchvision.datasets.MNIST(root, train=True, transform=torchvision.transforms.ToTensor())
    train = torch.utils.data.Subset(whole, range(options.images))
    turns = bare_loop(whole.data[: options.images, None])
    loader = torch.utils.data.DataLoader(
        train, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=options.repetitions + 1,
            default_root_dir=folder,
            callbacks=[turns.callback()],
            num_sanity_val_steps=0,
        )
        trainer.fit(Ordinary(), loader, torch.utils.data.DataLoader(torch.utils.data.Subset(whole, [0])))
    return turns.measured(len(loader))


def pythae(options: argparse.Namespace) -> dict[str, Any]:
    """pythae's BaseTrainer, epoch by epoch, with its progress bar."""
    import bare
    import torch
    from pair import all_images, train_split
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    encoder, decoder = bare.mlp(20)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = encoder

        def forward(self, x: torch.Tensor) -> ModelOutput:
            mean, log_var = self.net(x).chunk(2, dim=1)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = decoder

        def forward(self, z: torch.Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.net(z).sigmoid().unflatten(1, (1, 28, 28)))

    images = all_images(train_split("data=mnist"))[: options.images]
    x = torch.bernoulli(images.float() / 255, generator=torch.Generator().manual_seed(0))
    turns = bare_loop(images)
    with tempfile.TemporaryDirectory() as folder:
        trainer = BaseTrainer(
            VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=20, reconstruction_loss="bce"), Encoder(), Decoder()),
            BaseDataset(x, torch.zeros(len(x))),
            training_config=BaseTrainerConfig(
                output_dir=folder,
                num_epochs=options.repetitions + 1,
                per_device_train_batch_size=BATCH,
                learning_rate=1e-3,
                no_cuda=True,
            ),
        )
        trainer.prepare_training()
        for epoch in range(options.repetitions + 1):
            turns.bare_turn()
            trainer.train_step(epoch + 1)
            turns.end()
    return turns.measured(len(trainer.train_loader))


def measure(options: argparse.Namespace) -> None:
    import report
    import torch

    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    rows = {
        "this project": project(options),
        "Lightning + DataLoader, no workers": ordinary(options, 0),
        "Lightning + DataLoader, 2 workers": ordinary(options, 2),
        PYTHAE.replace("==", " "): pythae(options),
    }
    for row in rows.values():
        row["seconds_an_epoch"] = row["project_ms"] / 1e3 * -(-55_000 // BATCH)
    results = {"environments": {"peers": report.conditions(str(options.threads), load)}, "peers": rows}
    report.show(report.write_results(options.out, "peers", results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=25_600, help="of MNIST, an epoch")
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="of every process, the bare loops' too")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(options)
    else:
        command = [make_environment(), __file__, *sys.argv[1:], "--inside"]
        sys.exit(subprocess.run([str(part) for part in command]).returncode)


if __name__ == "__main__":
    main()
