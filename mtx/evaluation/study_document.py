"""What a study found, as one JSON document: `study.json`, what `--json` prints, and what its page is drawn from.

Decides the keys; what they say is computed in `study_row`. All values are plain JSON: numbers in SI units unless the
name says another one, null where something is unknown or was not measured.

    {
      "version": 1,
      "name": "laptop",                       # of the study's file, without .gin
      "config": "configs/studies/laptop.gin",
      "ended": 1795416241.2 | null,           # wall clock, when the last point ended; null before any has
      "machine": {"device_kind": "cpu", "num_devices": 4, "simulated": true, "host": "node1", "cores": 2,
                  "memory_bytes": 8.0e9,      # of one device; of simulated ones, their share of the host's
                  "in_table": false},         # whether its peak is a data sheet's
      "simulated": true,                      # whether any point ran on simulated CPU devices: say it everywhere
      "conventions": {"flops": "...", "peak": "...", "memory": "...", "plan": "..."},   # sentences for people
      "settings": {"steps": 10, "warmup_steps": 2, "minutes": 5.0},
      "counts": {"measured": 5, "failed": 1, "waiting": 0},
      "calibration": null | {"file": "cpu.json", "free": ["matmul_efficiency"], "points": 5,
                             "median_error_before": 0.31, "median_error_after": 0.04},       # |plan / measured - 1|
      "points": [{
        "name": "tiny, data 2", "size": "tiny", "layout": "data 2", "config_digest": "1f...",
        "status": "measured" | "failed" | "waiting",
        "failure": null | "misfit" | "out of memory" | "time-out" | "crash",
        "reason": null | "a sentence",                      # of what failed, or of why it waits (more devices needed)
        "run_dir": "points/tiny-data-2" | null,             # relative to the study's directory
        "simulated": true,
        "parameters": 2566272, "heads": 6, "hidden": 192, "layers": 4, "vocab": 4096, "experts": 0, "seq_len": 128,
        "batch": 8, "microbatch": 2, "num_microbatches": 1, "recompute": "none", "precision": "float32",
        "devices": 4,
        "mesh": {"pipe": 1, "data": 4, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1},
        "virtual_stages": 1, "zero": 2,
        "plan": null | {"step_seconds": 0.21, "step_parts": {"matmul": 0.1, ...},            # sum to step_seconds
                        "memory_bytes": 1.2e9, "memory_compiled_bytes": 1.0e9, "memory_parts": {"parameters": 1, ...},
                        "fits": true, "bubble_fraction": 0.0, "hardware_flops": 1.1e12},     # per device and step
        "measured": null | {"step_seconds": 0.25,           # median of the measured steps
                            "step_seconds_min": 0.24, "step_seconds_max": 0.29, "steps": 10, "tokens_per_second": 4.1e3,
                            "memory_bytes": 1.0e9 | null, "memory_kind": "device" | "compiler" | null,
                            "compile_seconds": 2.5, "seconds": 12.0,                         # of the whole point
                            "loss_first": 8.33, "loss_last": 8.1},
        "achieved": null | {"model_tflops_per_device": 0.05,                                 # attention in full
                            "model_tflops_per_device_causal": 0.04, "hardware_tflops_per_device": 0.05 | null,
                            "aggregate_pflops": 2e-4,                                        # model, attention in full
                            "peak_tflops": 0.11 | null, "peak_kind": "data sheet" | "measured matmul" | null,
                            "mfu_model_full": 0.45 | null, "mfu_model_causal": 0.40 | null, "hfu": 0.45 | null,
                            "train_days": [{"tokens": 3e11, "days": 900.1}, ...]},
        "error": null | {"step_seconds": -0.12 | null, "memory_bytes": 0.05 | null}          # plan / measured - 1
      }, ...]
    }

`memory_bytes` of kind "device" is the peak that the device's allocator reports, compared with `plan.memory_bytes`; of
kind "compiler" it is what the compiled step takes, compared with `plan.memory_compiled_bytes`. A failed point whose
fields contradict each other has no `parameters` (null); -1 in its `mesh` stands for what is left of the devices.
"""
