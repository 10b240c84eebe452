// The products of a group of LoRA projections forward and backward, in the order of lora/library.py.
//
// For the plain case: one adapter a projection or none, or a mixed batch; no dropout, no magnitude.
#pragma once
#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "held.h"
#include "mixed.h"

namespace {

struct Projection {
    Tensor weight;  // dense, the parameter itself; undefined where `decode` gives the values
    Held decode;
    Tensor bias;  // or undefined
    double scaling = 1.0;  // of its adapter, where it has one alone
    int64_t out_features = 0;
    int64_t adapters = 0;
    int64_t rank = 0;  // its columns of S

    Tensor values(ScalarType dtype) const {
        if (weight.defined()) return weight.to(dtype);
        return decode.call<Tensor>();
    }
};

struct Group : torch::CustomClassHolder {
    std::vector<Projection> projections;
    ScalarType compute, lora, out;
    std::optional<Mixed> mixed;
    int64_t rank = 0;
    Held check{py::none()};  // raises where a frozen weight was changed since forward
    Held dx{py::none()};  // gives the gradient of x where our kernels make it
    Flags trains_a, trains_b;  // of each adapter of a node
    bool needs_x = false;
    std::string made;  // the function that makes x of what is kept in its place, or none: see lora/remade.py

    bool keeps_x() const { return any(trains_a); }
    bool keeps_s() const { return any(trains_b); }
    bool one_dtype(ScalarType wide) const { return compute == lora && lora == wide; }
};

// `FUNCTIONS` of lora/remade.py.
Tensor made_again(const Tensor& kept, const std::string& function) {
    if (!kept.defined() || function.empty()) return kept;
    return function == "silu" ? at::silu(kept) : at::gelu(kept, function == "gelu" ? "none" : "tanh");
}

// Neither autograd nor autocast, as `in_use` of lora/autograd.py.
struct Plain {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// Matrices under each other, in `dtype`; undefined where there are none.
Tensor joined(const Tensors& matrices, ScalarType dtype) {
    if (matrices.empty()) return {};
    if (matrices.size() == 1) return matrices[0].to(dtype);
    int64_t rows = 0;
    for (const auto& matrix : matrices) rows += matrix.size(0);
    const Tensor all = at::empty({rows, matrices[0].size(1)}, matrices[0].options().dtype(dtype));
    rows = 0;
    for (const auto& matrix : matrices) {
        const auto first = std::exchange(rows, rows + matrix.size(0));
        all.narrow(0, first, matrix.size(0)).copy_(matrix);
    }
    return all;
}

// factor t, rounded to its own dtype and then to `dtype`, in one pass.
Tensor scaled(const Tensor& t, double factor, ScalarType dtype) {
    if (factor == 1.0) return t.to(dtype);
    Tensor product = at::empty(t.sizes(), t.options().dtype(dtype));
    return at::mul_out(product, t, at::native::wrapped_scalar_tensor(factor));
}

Packed pack(const Group& group, const Tensors& as, const Tensors& bs) {
    if (group.mixed) return group.mixed->owned->pack(as, bs, group.mixed->scalings, group.lora);
    Packed packed;
    packed.a = joined(as, group.lora);
    size_t next = 0;
    for (const auto& projection : group.projections) {
        packed.b.push_back(projection.rank == 0 ? Tensor() : scaled(bs[next++], projection.scaling, group.lora));
    }
    return packed;
}

Tensor down_projection(const Tensor& x, const Packed& packed, const Group& group) {
    return group.mixed ? group.mixed->rows->multiply(x, packed.a.mT()) : at::mm(x, packed.a.t());
}

// x w^T + s b^T + bias into out: the update first, for the large product to accumulate onto.
void linear(Tensor& out, const Tensor& x, const Tensor& w, const Tensor& bias) {
    if (bias.defined()) {
        at::addmm_out(out, bias, x, w.t());
    } else {
        at::mm_out(out, x, w.t());
    }
}

void project(Tensor& y, const Tensor& inputs, const Projection& projection, const Tensor& s, const Tensor& up,
             const Group& group) {
    const auto compute = group.compute;
    const Tensor w = projection.values(compute);
    const Tensor bias = projection.bias.defined() ? projection.bias.to(compute) : Tensor();
    Tensor base = y.scalar_type() == compute ? y : at::empty(y.sizes(), y.options().dtype(compute));
    if (!up.defined()) {
        linear(base, inputs, w, bias);
    } else if (group.one_dtype(c10::promoteTypes(group.lora, group.out))) {
        if (group.mixed) {
            group.mixed->rows->multiply(s, up.mT(), base, bias);
        } else {
            linear(base, s, up, bias);
        }
        at::addmm_out(base, base, inputs, w.t());
    } else {
        linear(base, inputs, w, bias);
        if (!base.is_same(y)) {
            const auto wide = c10::promoteTypes(compute, group.lora);
            if (c10::promoteTypes(wide, group.out) == group.out) {
                y.copy_(base);
                base = y;
            } else {
                base = base.to(wide);
            }
        }
        if (group.mixed) {
            base.add_(group.mixed->rows->multiply(s, up.mT()));
        } else if (s.scalar_type() == base.scalar_type()) {
            at::addmm_out(base, base, s, up.t());
        } else {
            base.add_(at::mm(s, up.t()));
        }
    }
    if (!base.is_same(y)) y.copy_(base);
}

// `forward_into` of lora/library.py: outputs of the rows x, and S, which may be given.
Tensor project_all(const Tensor& x, Tensors& outputs, Tensor s, const Packed& packed, const Group& group) {
    const Tensor inputs = x.to(group.compute);
    if (!s.defined() && packed.a.defined()) s = down_projection(x.to(group.lora), packed, group);
    int64_t column = 0;
    for (size_t i = 0; i < group.projections.size(); ++i) {
        const auto& projection = group.projections[i];
        const auto first = std::exchange(column, column + projection.rank);
        const Tensor own = projection.rank ? s.narrow(1, first, projection.rank) : Tensor();
        project(outputs[i], inputs, projection, own, packed.b[i], group);
    }
    return s;
}

Tensor rows_contiguous(const Tensor& t) {
    return t.stride(-1) == 1 && t.stride(0) >= t.size(1) ? t : t.contiguous();
}

// a b, kept in fp32 where the product of 16-bit operands can be had so and the result is wanted in fp32.
Tensor mm_wide(const Tensor& a, const Tensor& b, ScalarType dtype) {
    if (a.is_cuda() && dtype == at::kFloat && a.element_size() == 2) return at::mm(a, b, at::kFloat);
    return at::mm(a, b);
}

Tensor times(const Tensor& product, double factor, ScalarType dtype) {
    return (factor == 1.0 ? product : at::mul(product, factor)).to(dtype);
}

// dx += dS A, in the wider of the two dtypes.
Tensor add_update(Tensor dx, const Tensor& ds, const Tensor& a, const Group& group) {
    if (!dx.defined()) return group.mixed ? group.mixed->rows->multiply(ds, a) : at::mm(ds, a);
    dx = dx.to(c10::promoteTypes(dx.scalar_type(), ds.scalar_type()));
    if (group.mixed) return dx.add_(group.mixed->rows->multiply(ds, a));
    if (dx.scalar_type() == ds.scalar_type()) return at::addmm_out(dx, dx, ds, a);
    return dx.add_(at::mm(ds, a));
}

Tensor input_gradient(const Tensors& dys, Tensor ds, const Group& group, const Packed& packed,
                      ScalarType dx_dtype) {
    const auto wide = c10::promoteTypes(group.compute, dx_dtype);
    Tensor update, dx;
    if (ds.defined() && group.one_dtype(wide)) {
        std::swap(update, ds);
        if (group.mixed) dx = add_update({}, std::exchange(update, {}), packed.a, group);
    }
    for (size_t i = 0; i < dys.size(); ++i) {
        if (!dys[i].defined()) continue;
        const Tensor dy = dys[i].to(group.compute);
        const Tensor w = group.projections[i].values(group.compute);
        if (wide == group.compute) {
            if (!dx.defined()) {
                dx = update.defined() ? at::mm(update, packed.a) : at::mm(dy, w);
                if (update.defined()) at::addmm_out(dx, dx, dy, w);
            } else {
                at::addmm_out(dx, dx, dy, w);
            }
        } else {
            const Tensor part = at::mm(dy, w);
            dx = dx.defined() ? dx.add_(part) : part.to(wide);
        }
    }
    return ds.defined() ? add_update(dx, ds, packed.a, group) : dx;
}

// dB of the adapters of projection i, the first of which is number `adapter`, into results; ds[:] = dY (scaling B).
void up_gradients(size_t i, size_t adapter, const Tensor& dy, const Tensor& s, Tensor ds, const Packed& packed,
                  const Tensors& bs, const Flags& trains_b, const Group& group, Tensors& results) {
    if (group.mixed) {
        const auto& owned = *group.mixed->owned;
        const auto trained = owned.of(i, trains_b);
        auto found = owned.up_gradients(*group.mixed->rows, i, dy, s, packed.b[i], ds, owned.of(i, bs), trained);
        for (auto& db : found) results[2 + 2 * adapter++] = std::move(db);
        return;
    }
    at::mm_out(ds, dy, packed.b[i]);
    if (!trains_b[adapter]) return;
    const auto dtype = bs[adapter].scalar_type();
    results[2 + 2 * adapter] = times(mm_wide(dy.t(), s, dtype), group.projections[i].scaling, dtype);
}

// dA of all adapters, into results.
void down_gradients(const Tensor& ds, const Tensor& x, const Tensors& as, const Flags& trains_a, const Group& group,
                    Tensors& results) {
    if (group.mixed) {
        const auto& [rows, owned, scalings] = *group.mixed;
        auto found = owned->down_gradients(*rows, ds, x, scalings, as, trains_a);
        for (size_t k = 0; k < found.size(); ++k) results[1 + 2 * k] = std::move(found[k]);
        return;
    }
    const Tensor joint = mm_wide(ds.t(), x, as[0].scalar_type());
    int64_t column = 0;
    for (size_t k = 0; k < as.size(); ++k) {
        const auto rank = as[k].size(0), first = std::exchange(column, column + rank);
        if (trains_a[k]) results[1 + 2 * k] = joint.narrow(0, first, rank).to(as[k].scalar_type());
    }
}

// dB of all adapters into results, and dS, undefined where no output has a gradient or there is no adapter.
Tensor up_gradients(const Tensors& dys, const Tensor& s, const Packed& packed, const Tensors& bs, const Flags& trains_b,
                    const Group& group, Tensors& results) {
    int64_t tokens = -1;
    bool all = true;
    for (const auto& dy : dys) {
        if (dy.defined()) tokens = dy.size(0);
        all = all && dy.defined();
    }
    if (tokens < 0 || !packed.a.defined()) return {};
    const auto options = packed.a.options();
    const Tensor ds = all ? at::empty({tokens, group.rank}, options) : at::zeros({tokens, group.rank}, options);
    int64_t column = 0;
    size_t adapter = 0;
    for (size_t i = 0; i < dys.size(); ++i) {
        const auto& projection = group.projections[i];
        const auto first = std::exchange(column, column + projection.rank);
        const auto at = std::exchange(adapter, adapter + projection.adapters);
        if (projection.rank == 0 || !dys[i].defined()) continue;
        const Tensor own = s.defined() ? s.narrow(1, first, projection.rank) : Tensor();
        up_gradients(i, at, dys[i].to(group.lora), own, ds.narrow(1, first, projection.rank), packed, bs, trains_b, group,
                     results);
    }
    return ds;
}

// Gradients of x, and of each adapter's a and b.
Tensors derive(const Tensors& given, const std::vector<int64_t>& shape, ScalarType x_dtype, const Tensor& x,
               const Tensor& s, const Tensors& as, const Tensors& bs, const Group& group) {
    const auto count = group.projections.size();
    Tensors results(1 + 2 * as.size()), dys(count);
    bool some = false;
    for (size_t i = 0; i < count; ++i) {
        if (given[i].defined()) dys[i] = rows_contiguous(given[i].reshape({-1, given[i].size(-1)}));
        some = some || given[i].defined();
    }
    if (!some) return results;
    const Packed packed = pack(group, as, bs);
    const Tensor ds = up_gradients(dys, s, packed, bs, group.trains_b, group, results);
    if (group.needs_x) {
        const Tensor dx = group.dx.none() ? input_gradient(dys, ds, group, packed, x_dtype)
                                          : group.dx.call<Tensor>(dys, ds, packed.a, x_dtype);
        if (dx.defined()) results[0] = dx.view(shape).to(x_dtype);
    }
    if (ds.defined() && group.keeps_x()) {
        down_gradients(ds, x.reshape({-1, x.size(-1)}).to(group.lora), as, group.trains_a, group, results);
    }
    size_t adapter = 0;
    for (size_t i = 0; i < count; ++i) {  // without a gradient of an output its adapters have none, in place of zeros
        for (int64_t j = 0; j < group.projections[i].adapters; ++j, ++adapter) {
            if (!dys[i].defined()) results[1 + 2 * adapter] = Tensor();
        }
    }
    return results;
}

}  // namespace
