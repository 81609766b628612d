"Sizes: counts by hand, the backbone's known figures, FSPN's weights, and every method of the zoo"
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fspn_nb.analysis.complexity import (backbone_flops,beside_paper,complexity_table,flops_of,latency_of,
    parameters_of,peak_of)
from fspn_nb.config import ModelCfg
from fspn_nb.models.i3d import I3D
from fspn_nb.paper import paper_table
from fspn_nb.zoo import create_model,list_models,random_batch


@pytest.fixture(scope='module')
def table():
    "One row per method, FineDiving"
    return complexity_table()


def test_a_linear_map_by_hand():
    assert parameters_of(nn.Linear(3, 2)) == dict(head=8, adapter=0)
    assert flops_of(nn.Linear(3, 2), torch.zeros(1, 3)) == 12 and flops_of(nn.Linear(3, 2, bias=False), torch.zeros(5, 3)) == 60


@pytest.mark.parametrize('layer, shape, adds', [(nn.Conv1d(2, 3, 3, padding=1), (1, 2, 7), 7*3*2*3), (nn.Conv1d(4, 4, 3, padding=1, groups=4), (1, 4, 7), 7*4*3),
                                                (nn.Conv3d(3, 4, 3, 2), (1, 3, 5, 5, 5), 8*4*3*27)], ids=('conv1d', 'grouped', 'strided'))
def test_convolutions_by_hand(layer, shape, adds):
    assert flops_of(layer, torch.zeros(shape)) == 2*adds


def test_attention_is_counted_whatever_kernel_would_run():
    q, k = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 6, 8)
    assert flops_of(F.scaled_dot_product_attention, q, k, k) == 2*2*(2*4*6*8)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(1, 4, 8)
    projections, products = 2*4*(4*8*8), 2*2*(4*4*8)
    for weights in (True, False): assert flops_of(lambda: layer.eval()(x, x, x, need_weights=weights)) == projections+products


@pytest.mark.parametrize('layer, gates', [(nn.LSTM(6, 5, batch_first=True), 4), (nn.GRU(6, 5, batch_first=True), 3)], ids=('lstm', 'gru'))
def test_recurrent_layers_by_hand(layer, gates):
    assert flops_of(layer, torch.zeros(1, 7, 6)) == 2*7*gates*5*(6+5)


def test_counting_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(.5)).train()
    net[1].eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    for f in (flops_of, peak_of, latency_of): f(net, torch.ones(2, 4))
    assert net.training and net[0].training and not net[1].training and net[1].num_batches_tracked == 0
    with pytest.raises(RuntimeError): flops_of(net, torch.ones(2, 5))
    assert net.training and torch.backends.mha.get_fastpath_enabled() == fast and torch.is_grad_enabled()


def test_d09_the_backbone_alone_is_thousands_of_times_the_printed_operations():
    small, large = backbone_flops(112), backbone_flops(224)
    assert small/1e9 == pytest.approx(14.0, abs=.05) and large/1e9 == pytest.approx(55.6, abs=.05)
    assert backbone_flops(112, length=32) == pytest.approx(2*small, rel=1e-6)
    assert parameters_of(I3D())['head'] == 12_697_264
    printed = max(paper_table(name).mflops.max() for name in ('VII', 'VIII'))
    assert small/1e6 > 5000*printed


def test_the_backbones_count_does_not_depend_on_the_device():
    net = I3D().eval()
    assert flops_of(net.features, torch.zeros(1, 3, 8, 32, 32)) == backbone_flops(32, length=8)


@pytest.mark.parametrize('name, head', [('fspn', 3_925_127), ('fspn_m', 1_244_295), ('fspn_s', 444_167)])
def test_fspn_has_the_printed_sizes(name, head):
    sizes = parameters_of(create_model(name))
    assert sizes == dict(head=head, adapter=1_049_600)
    printed = paper_table('VIII').set_index('method').mparams[name]
    assert abs(head/1e6/printed-1) < (.05 if name == 'fspn' else .1)


def test_a_vote_costs_what_its_linear_maps_cost(table):
    rows = table.set_index('method')
    for name in ('fspn', 'fspn_s'):
        weights = sum(m.weight.numel() for m in create_model(name).regressor.modules() if isinstance(m, nn.Linear))
        assert rows.mflops_vote[name] == pytest.approx(2*weights/1e6)
    assert rows.mflops['i3d_mlp'] == pytest.approx(2*(1024*256+256*128+128)/1e6) and rows.mflops_vote['i3d_mlp'] == 0


def test_every_method_has_a_row(table):
    assert table.method.tolist() == list_models()
    counts = table.drop(columns='method')
    assert np.isfinite(counts.to_numpy(float)).all() and (table[['parameters', 'mflops', 'memory_mb', 'i3d_gflops']] > 0).all(axis=None)
    assert (table.mflops/2 > .95*table.parameters/1e6).all(), 'd93: some weight would never be used'
    clips = table[table.streams > 0]
    assert (clips.i3d_gflops/clips.streams).nunique() == 1
    assert table.method[table.streams == 0].tolist() == ['tpt'] # twenty short clips instead
    assert table.i3d_gflops[table.method == 'tpt'].iloc[0] == pytest.approx(20*backbone_flops(112, 8)/1e9)
    assert complexity_table().equals(table), 'a count that changes is no count'


def test_ten_clips_of_twice_the_side_cost_more(table):
    mtl = complexity_table(['fspn', 'i3d_mlp'], 'mtl_aqa').set_index('method')
    assert mtl.i3d_gflops['fspn'] == pytest.approx(20*backbone_flops(224)/1e9)
    assert mtl.i3d_gflops['i3d_mlp'] == pytest.approx(10*backbone_flops(224)/1e9)
    with pytest.raises(ValueError, match='need a dataset out of'): complexity_table(dataset='kinetics')
    with pytest.raises(ValueError, match='unknown method'): complexity_table(['fpsn'])


def test_the_print_keeps_its_rows_and_what_we_lack_stays_empty(table):
    ours = table[table.method.isin(['fspn', 'fspn_s'])]
    both = beside_paper('VIII', ours).set_index('method')
    assert both.index.tolist() == ['tsa', 'fspn_s', 'fspn_m', 'fspn']
    assert both.mparams_ours.isna().tolist() == [True, False, True, False] and both.mparams_paper.tolist() == [.60, .48, 1.31, 3.75]
    assert both.gflops_with_i3d['fspn'] > 250
    assert beside_paper('VII', ours).method.tolist() == ['musdl', 'core_tree', 'hgcn', 'fspn']
    for wrong in ('IX', 'vii', None):
        with pytest.raises(ValueError, match='a table of sizes'): beside_paper(wrong, table)


def test_d93_printed_operations_cannot_use_every_weight(table):
    size = paper_table('VIII').set_index('method')
    assert size.mflops['fspn'] < size.mparams['fspn']
    assert size.mparams['fspn']/size.mparams['fspn_s'] > 7 and size.mflops['fspn']/size.mflops['fspn_s'] < 1.02
    assert table.set_index('method').mflops['fspn'] > 10*size.mflops['fspn']


def test_memory_counts_what_is_alive_and_nothing_else():
    layers = [nn.Linear(250, 250) for _ in range(10)]
    assert peak_of(nn.Sequential(*layers), torch.zeros(1, 250)) == 2000
    assert peak_of(nn.Sequential(*layers).to('meta'), torch.zeros(1, 250, device='meta')) == 2000
    assert peak_of(nn.Sequential(nn.Flatten(), nn.Identity()), torch.zeros(1, 5, 5)) == 0, 'views cost nothing'
    model, batch = create_model('fspn_s').eval(), random_batch(1)
    one, two = peak_of(model.encode, batch), peak_of(model.encode, random_batch(2))
    assert one == peak_of(model.encode, batch) and 1.5*one < two < 2.5*one


def test_latency_is_a_median_of_seconds():
    assert 0 < latency_of(nn.Linear(3, 2), torch.zeros(1, 3), n=1) < 1
    with pytest.raises(ValueError, match='at least one call'): latency_of(nn.Linear(3, 2), torch.zeros(1, 3), n=0)
    assert 'seconds' in complexity_table(['i3d_mlp'], n=1)


@pytest.mark.parametrize('name, counted', [('core_tree', 2_510_382), ('musdl', 2_086_035), ('tsa', 311_759)])
def test_d94_sizes_counted_in_the_released_code_are_ours_and_not_the_prints(table, name, counted):
    if name not in list_models(): pytest.skip(f'{name} is not in the zoo')
    printed = pd.concat([paper_table(number) for number in ('VII', 'VIII')]).set_index('method').mparams[name]
    assert table.set_index('method').parameters[name] == counted and abs(counted/1e6/printed-1) > .1


def test_tsas_adapter_is_counted_apart(table):
    "It stands in front of the network in frozen mode, and the network's own size is the released one"
    rows = table.set_index('method')
    assert (rows.parameters['tsa'], rows.adapter['tsa'], rows.adapter['usdl']) == (311_759, 1_049_600, 0)
