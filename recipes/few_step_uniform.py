"""Uniform-state diffusion (Duo) and its inverse distillation, trained from random weights on a CPU.

Method: IDLM (arXiv 2602.19066) on uniform-state diffusion (arXiv 2506.10892). The task is made here: repeat one digit
four times, any digit. Printed is the share of answers that do, and over how many of the ten digits they spread, at 1
to 32 denoising steps, for a teacher and for the student that IDLM makes of it for 4. Minutes:

    python recipes/few_step_uniform.py
"""


def main() -> None:
    from pathlib import Path
    from statistics import mean, stdev

    from embedded.uniform_state import compare

    steps, seeds = (1, 2, 4, 8, 16, 32), (0, 1, 2)
    found = compare(Path("outputs/few_step_uniform"), seeds, num_steps=4, steps=steps)
    print(
        "answers that repeat one digit in % ± standard deviation over three seeds (digits they spread over, of 10)\n"
    )
    print(f"{'':>10}" + "".join(f"{number:>20}" for number in steps))
    for name, by_seed in found.items():
        cells = []
        for measured in zip(*by_seed, strict=True):
            shares, digits = zip(*measured, strict=True)
            cells.append(f"{100 * mean(shares):.1f} ± {100 * stdev(shares):.1f} ({mean(digits):.1f})")
        print(f"{name:>10}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
