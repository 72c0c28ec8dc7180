"""What `dlm-fast bench` and the benchmark scripts share: problems, truth, plain rivals, clocks."""
