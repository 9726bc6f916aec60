from headstart import training


def test_train_leaves_a_finished_run(shapes, tiny_weights, tmp_path):
    run = training.train(shapes, tmp_path / "run", weights=str(tiny_weights))
    assert (tmp_path / "run" / "metrics.json").is_file()
    assert run.evaluation.metrics["accuracy"].n == len(run.evaluation.sources)
