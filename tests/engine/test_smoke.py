def test_x(tiny_config, tmp_path, single_process, losses_of, deepspeed_run):
    from hl_scale.engine.loop import train
    r=train(tiny_config(tmp_path/"a", {"training.steps":6}))
    a=losses_of(tmp_path/"a"); b=losses_of(deepspeed_run)
    print(a,b,[abs(x-y)/x for x,y in zip(a,b)])
    assert 0
