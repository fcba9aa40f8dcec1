"""Export a Qwen3 block-diffusion student for SGLang and LMDeploy, which serve it as SDAR.

    python recipes/export.py --model_name_or_path outputs/mine --output_dir outputs/mine-sdar

`--model_name_or_path` is a Hub name, a folder, or an adapter's folder (merged into its base). Runs on a CPU; needs
memory for the weights, and for one more copy of the head where it is tied. A student that does not fit (another mask
id than 151669, full-sequence diffusion, another network than Qwen3's) is refused with the reasons. The launch
commands for the engines are printed, and written to SERVING.md beside the weights.
"""

from dataclasses import dataclass, field


@dataclass
class ExportArguments:
    """What to export, and where."""

    model_name_or_path: str = field(metadata={"help": "Student or adapter: Hub name or folder."})
    output_dir: str = field(metadata={"help": "Folder to write."})
    format: str = field(default="sdar", metadata={"help": "Network that engines serve it as: sdar."})
    confidence_threshold: float = field(
        default=0.9, metadata={"help": "Probability in (0, 1] at which the engines reveal a token."}
    )


def main() -> None:
    from tide_hf import export_for_serving
    from tide_hf.commands.parsing import RecipeParser
    from tide_hf.commands.refusals import refusing
    from tide_hf.hub import require_available

    (arguments,) = RecipeParser((ExportArguments,)).parse_args_and_config()
    with refusing():
        require_available([arguments.model_name_or_path], [])
        folder = export_for_serving(
            arguments.model_name_or_path,
            arguments.output_dir,
            format=arguments.format,
            confidence_threshold=arguments.confidence_threshold,
        )
    print((folder / "SERVING.md").read_text())


if __name__ == "__main__":
    main()
