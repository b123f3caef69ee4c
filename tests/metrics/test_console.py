def test_deepspeed_s_line_about_a_machine_without_a_gpu_is_dropped_and_no_other():
    """Every command wrote it that imports DeepSpeed; the log says on which device a run is."""
    log = logging.getLogger("DeepSpeed")
    lines = (
        "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",
        "an error",
    )
    records = [logging.LogRecord("DeepSpeed", logging.WARNING, "", 1, line, (), None) for line in lines]
    assert [bool(log.filter(record)) for record in records] == [False, True]
