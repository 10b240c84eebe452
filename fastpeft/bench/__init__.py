"""What `fastpeft bench` and the GPU checks need: records of measurements, peers, timers."""
