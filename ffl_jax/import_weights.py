"""Turns published PyTorch weights into a checkpoint: `python -m ffl_jax.import_weights --source=ffsd ...`."""

from absl import flags

from ffl_jax import cli

USAGE = """
python -m ffl_jax.import_weights --source=ffl-pytorch|ffsd --input=FILE [--input=FILE] --workdir=DIR
                                 --config=configs/DATA.py [--config.KEY=VALUE ...]
                                 [--state=GROUP] [--network=NAME]

Reads .npz and .safetensors files, and .pth, .pt and .tar files where PyTorch is installed, and writes a
checkpoint that `evaluate` and `export` take like that of a run. The configuration names the dataset that the
weights were trained on, and how its images are normalised; the weights say the rest: K sub-networks on a
shared trunk and their fusion module (method ffl), or one of FFSD's networks (method independent).
"""


def command(argv: list[str]):
    values = cli.new_flags()
    flags.DEFINE_enum(
        "source", None, ["ffl-pytorch", "ffsd"], "Whose released code wrote them.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "input", [], "The file, or for FFL's two files one flag for each.", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "The folder to write.", flag_values=values)
    flags.DEFINE_string(
        "state", "", "Which group of arrays, where a file holds several states.", flag_values=values
    )
    flags.DEFINE_string("network", "", "Its name here; recognised by default.", flag_values=values)
    cli.parse(values, argv, USAGE, config=True)
    for name in ("source", "input", "workdir"):
        if not values[name].value:
            raise cli.ConfigError(f"--{name} is missing; see --help.")

    from ffl_jax.training import conversion

    weights = conversion.load(values.source, values.input, values.state, values.network)
    conversion.write(weights, values.config, values.workdir)
    trunk = f", the first {weights.shared_stages} stages shared" if weights.shared_stages else ""
    print(f"{weights.num} x {weights.network} for {weights.num_classes} classes{trunk}: {weights.method}")
    if weights.left_out:
        print(f"left out, for training only: {len(weights.left_out)} entries of trans_fusion_module")
    print(f"written to {values.workdir}; score it with python -m ffl_jax.evaluate --workdir={values.workdir}")


def run():
    cli.run(command)


if __name__ == "__main__":
    run()
