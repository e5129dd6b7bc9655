"""sb3-contrib's RecurrentPPO learns to balance a pole."""

from __future__ import annotations

from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from benchmarks.programs import swap
from benchmarks.programs.measured import Clock, report


def main() -> None:
    environment = make_vec_env("CartPole-v1", 8, seed=1)
    model = RecurrentPPO(
        "MlpLstmPolicy",
        environment,
        n_steps=128,
        batch_size=256,
        learning_rate=1e-3,
        seed=1,
        policy_kwargs={"lstm_hidden_size": 64, "net_arch": {"vf": [64], "pi": []}, "ortho_init": False},
    )
    swap.replace(model.policy)
    figures = {}
    evaluation = make_vec_env("CartPole-v1", 4, seed=2)
    figures["mean return, untrained"] = float(evaluate_policy(model, evaluation, 20, warn=False)[0])
    with Clock() as clock:
        model.learn(4_096)
    figures["mean return, after 4,096 steps"] = float(evaluate_policy(model, evaluation, 20, warn=False)[0])
    report(figures, clock)


if __name__ == "__main__":
    main()
