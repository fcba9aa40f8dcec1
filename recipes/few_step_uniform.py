"""Uniform-state diffusion (Duo) and its inverse distillation, trained from random weights on a CPU.

Method: IDLM (arXiv 2602.19066) on uniform-state diffusion (arXiv 2506.10892). The task is made here: repeat one digit
four times, any digit. It prints the share of answers that do, and over how many of the ten digits they spread, at 1 to
32 denoising steps, for a teacher and for a student that IDLM distils from it for 4 steps. Takes minutes:

    python recipes/few_step_uniform.py
"""


def main() -> None:
    from embedded.uniform_state import show_uniform_state

    show_uniform_state("outputs/few_step_uniform")


if __name__ == "__main__":
    main()
